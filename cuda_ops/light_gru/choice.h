// Which kernel runs a layer: the one table that decides it, for the launchers, for
// `python -m sb_fast_sligru.info` and for the tests. No CUDA headers: any GPU can be pretended.
//
// A kernel of the persistent backend keeps U on chip in a cluster of blocks that each own some
// units, and a cluster serves some rows (sequences of the batch, times directions). To add a
// family: an enumerator, its lines in kTable, its two launchers in persistent/launch.cu.
#pragma once

#include <algorithm>

#include "common/gpu.h"
#include "common/types.h"

namespace sb_fast_sligru {

enum class Direction { kForward, kBackward };

enum class Kernel { kStepwise, kNarrow, kNarrowFloat, kWide, kWideFloat, kMany };

inline const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kStepwise:
      return "stepwise";
    case Kernel::kNarrow:
      return "narrow";
    case Kernel::kNarrowFloat:
      return "narrow_float";
    case Kernel::kWide:
      return "wide";
    case Kernel::kWideFloat:
      return "wide_float";
    case Kernel::kMany:
      return "many";
  }
  __builtin_unreachable();
}

struct KernelChoice {
  Kernel kernel;
  int cluster;  // blocks; 0 for stepwise, as the next two
  int units;    // of a block
  int rows;     // that a cluster serves, at most
  const char* reason;

  // Units that a cluster holds.
  int padded_hidden() const { return cluster * units; }
  int64_t clusters(int64_t all_rows) const { return ceil_div(all_rows, rows); }
};

// When a layer that fits a line of the table takes it.
enum class When {
  kAlways,
  kInOneWave,  // if all its clusters run at once; those beyond would wait for a second wave
  kIfFaster,   // if its waves take less time than those of the next line
};

// Microseconds a step of one wave: base + row * the rows that a cluster serves. Measured, see
// benchmarks/NOTEBOOK.md; only their ratios matter, and only for kIfFaster.
struct StepTime {
  float base, row;
};

struct KernelLine {
  Kernel kernel;
  bool is_float;  // operands: float32, or 16-bit
  int largest_hidden;
  int cluster, units, rows;
  bool spreads;  // the rows evenly over the clusters of its waves, instead of filling each cluster
  When when;
  const char* reason;
  StepTime forward = {}, backward = {};

  StepTime time(Direction direction) const {
    return direction == Direction::kForward ? forward : backward;
  }
};

// In the order of preference. A layer fits the lines of its operands with the smallest
// largest_hidden that holds it.
// clang-format off
constexpr KernelLine kTable[] = {
    {Kernel::kNarrow, false, 128, 4, 32, 4, false, When::kAlways, "4 blocks hold U"},
    {Kernel::kNarrow, false, 256, 8, 32, 4, false, When::kAlways, "8 blocks hold U"},
    {Kernel::kNarrow, false, 512, 16, 32, 4, false, When::kInOneWave,
     "16 blocks hold U, and all clusters run at once"},
    {Kernel::kNarrow, false, 512, 8, 64, 4, false, When::kAlways,
     "not all clusters of 16 would run at once, so clusters of 8 larger blocks"},
    {Kernel::kMany, false, 1024, 16, 64, 40, true, When::kIfFaster,
     "the faster kernel for so many rows", {3.85f, 0.026f}, {3.95f, 0.05f}},
    {Kernel::kWide, false, 1024, 16, 64, 8, false, When::kAlways,
     "the faster kernel for so few rows", {1.87f, 0.f}, {1.39f, 0.f}},
    {Kernel::kNarrowFloat, true, 128, 4, 32, 4, true, When::kAlways, "4 blocks hold U"},
    {Kernel::kNarrowFloat, true, 256, 8, 32, 4, true, When::kAlways, "8 blocks hold U"},
    {Kernel::kNarrowFloat, true, 512, 16, 32, 4, true, When::kAlways, "16 blocks hold U"},
    {Kernel::kWideFloat, true, 1024, 16, 64, 8, false, When::kAlways,
     "16 blocks hold a part of U, the L2 cache the rest"},
};
// clang-format on

// Shared memory of a block of the kernels for H > 512, at most: all that a block of 9.0 may have.
constexpr int kWideSharedBytes = 227 * 1024;

inline bool can_run(const KernelLine& line, const Gpu& gpu) {
  const bool is_wide = line.units * line.cluster > 512;
  return gpu.clusters(line.cluster) > 0 && (!is_wide || gpu.shared_bytes >= kWideSharedBytes) &&
         (line.kernel != Kernel::kMany || gpu.has_warpgroup_code);
}

inline int rows_of_cluster(const KernelLine& line, int64_t rows, const Gpu& gpu) {
  if (!line.spreads) return line.rows;
  const int64_t at_once = gpu.clusters(line.cluster), waves = ceil_div(rows, at_once * line.rows);
  return static_cast<int>(ceil_div(rows, at_once * waves));
}

inline float microseconds(const KernelLine& line, int64_t rows, Direction direction,
                          const Gpu& gpu) {
  const int each = rows_of_cluster(line, rows, gpu);
  const int64_t waves = ceil_div(ceil_div(rows, each), gpu.clusters(line.cluster));
  const StepTime time = line.time(direction);
  return waves * (time.base + time.row * each);
}

// The kernel for a layer of `rows` rows, 1 or more. If it is stepwise, the reason says why no other.
inline KernelChoice choose(int64_t hidden, int64_t rows, DType operand_type, Direction direction,
                           const Gpu& gpu) {
  const auto stepwise = [](const char* reason) {
    return KernelChoice{Kernel::kStepwise, 0, 0, 0, reason};
  };
  if (operand_type == DType::kFloat64)
    return stepwise("the persistent kernels take float32, bfloat16 and float16 operands only");
  if (hidden < 16 || hidden % 8 != 0)
    return stepwise("the hidden size is not a multiple of 8 from 16 on");
  if (hidden > 1024)
    return stepwise("the hidden size is above 1024: the recurrent weight does not fit on chip");
  if (gpu.capability < 90)
    return stepwise(
        "the GPU is older than compute capability 9.0, which has thread-block clusters");
  if (!gpu.has_cluster_code)
    return stepwise("the library was built without code for 9.0a or the GPU's own architecture");

  int fitting = 0;
  for (const KernelLine& line : kTable) {
    const bool fits = line.is_float == (operand_type == DType::kFloat32) &&
                      hidden <= line.largest_hidden &&
                      (fitting == 0 || line.largest_hidden == fitting);
    if (!fits) continue;
    fitting = line.largest_hidden;
    if (!can_run(line, gpu)) continue;
    if (line.when == When::kInOneWave && rows > line.rows * gpu.clusters(line.cluster)) continue;
    if (line.when == When::kIfFaster && microseconds(line, rows, direction, gpu) >=
                                            microseconds(*(&line + 1), rows, direction, gpu))
      continue;
    return {line.kernel, line.cluster, line.units, rows_of_cluster(line, rows, gpu), line.reason};
  }
  return stepwise(
      "the GPU, or SB_FAST_SLIGRU_MAX_CLUSTER, does not allow thread-block clusters of the size "
      "needed");
}

}  // namespace sb_fast_sligru
