// Which kernel runs a layer: the tables that decide it, for the launchers, for
// `python -m sb_fast_sligru.info` and for the tests. No CUDA headers: any GPU can be pretended.
//
// A kernel of the persistent backend keeps U on chip in a group of blocks that each own some units,
// and a group serves some rows (sequences of the batch, times directions). Its blocks are a
// thread-block cluster (kTable) or, where no such kernel can run, exchange through the L2 cache
// (kL2Table). To add a family: an enumerator, its lines in kTable, its two launchers in
// persistent/launch.cu.
#pragma once

#include <algorithm>
#include <cstddef>

#include "common/gpu.h"
#include "common/types.h"

namespace sb_fast_sligru {

enum class Direction { kForward, kBackward };

enum class Kernel { kStepwise, kNarrow, kNarrowFloat, kWide, kWideFloat, kMany, kL2 };

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
    case Kernel::kL2:
      return "l2";
  }
  __builtin_unreachable();
}

// The largest H of the variant of kL2 that takes so many units.
constexpr int l2_capacity(int units) {
  int capacity = 256;
  while (capacity < units) capacity *= 2;
  return capacity;
}

struct KernelChoice {
  Kernel kernel;
  int group;  // blocks that share U: a thread-block cluster or, for kL2, blocks of a cooperative
              // launch that exchange through the L2 cache; 0 for stepwise, as the next two
  int units;  // of a block
  int rows;   // that a group serves, at most
  const char* reason;

  // Units that the kernel computes.
  int padded_hidden() const {
    return kernel == Kernel::kL2 ? l2_capacity(group * units) : group * units;
  }
  int64_t groups(int64_t all_rows) const { return ceil_div(all_rows, rows); }
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
// largest_hidden that holds it; so too in kL2Table.
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

// kL2, whose blocks have a multiprocessor each. The fewer blocks a group has, the faster they
// exchange, which forward they do twice a step, and the more each of them has to multiply.
struct L2Line {
  bool is_float;
  int largest_hidden;
  int units;
  int kept_bytes;  // of U in a block's shared memory; the rest of it is in registers
  bool is_forward_of_fast = false;  // for the forward pass alone, on GPUs with kFastShared

  int group(int64_t hidden) const { return static_cast<int>(ceil_div(hidden, units)); }
};

// GPUs whose blocks have so much shared memory (8.0, 9.0, 10.0) multiply 16-bit numbers and add
// them in float at twice the rate of the others.
constexpr int kFastShared = 160 * 1024;
constexpr int kL2Kept = 128 * 1024, kL2KeptFloat = 32 * 1024;

constexpr L2Line kL2Table[] = {{false, 256, 32, 0},       {false, 512, 64, 0, true},
                               {false, 512, 32, 0},       {false, 1024, 64, kL2Kept},
                               {false, 1024, 32, 0},      {false, 2048, 32, kL2Kept},
                               {false, 2048, 16, 0},      {true, 512, 32, kL2KeptFloat},
                               {true, 1024, 32, kL2Kept}, {true, 1024, 16, kL2KeptFloat}};

constexpr int kL2Warps = 8;  // of a block
// Rows that a group serves at most: a lane has two cells, of two rows or two units.
constexpr int l2_most_rows(int units) { return units > 32 ? kL2Warps : 2 * kL2Warps; }

// Shared memory of a block for each row, at most: the partial sums of its warps.
constexpr int l2_row_bytes(int units) { return kL2Warps * 8 * units + 32; }

// The largest_hidden of the lines that a layer fits; 0 if it fits none.
template <class Line, std::size_t kLines>
int size_for(const Line (&table)[kLines], int64_t hidden, bool is_float) {
  for (const Line& line : table)
    if (line.is_float == is_float && hidden <= line.largest_hidden) return line.largest_hidden;
  return 0;
}

// `rows` spread evenly over the groups of their waves, in which `at_once` groups of up to `most` rows
// run.
inline int spread_rows(int64_t rows, int64_t at_once, int most) {
  return static_cast<int>(ceil_div(rows, at_once * ceil_div(rows, at_once * most)));
}

inline bool can_run(const KernelLine& line, const Gpu& gpu) {
  const bool is_wide = line.units * line.cluster > 512;
  return gpu.clusters(line.cluster) > 0 && (!is_wide || gpu.shared_bytes >= kWideSharedBytes) &&
         (line.kernel != Kernel::kMany || gpu.has_warpgroup_code);
}

inline int rows_of_cluster(const KernelLine& line, int64_t rows, const Gpu& gpu) {
  return line.spreads ? spread_rows(rows, gpu.clusters(line.cluster), line.rows) : line.rows;
}

inline float microseconds(const KernelLine& line, int64_t rows, Direction direction,
                          const Gpu& gpu) {
  const int each = rows_of_cluster(line, rows, gpu);
  const int64_t waves = ceil_div(ceil_div(rows, each), gpu.clusters(line.cluster));
  const StepTime time = line.time(direction);
  return waves * (time.base + time.row * each);
}

inline KernelChoice refuse(const char* reason) { return {Kernel::kStepwise, 0, 0, 0, reason}; }

// `reason`: why no kernel of kTable runs.
inline KernelChoice choose_l2(int64_t hidden, int64_t rows, DType operand_type, Direction direction,
                              const Gpu& gpu, const char* reason) {
  if (gpu.capability < 75) return refuse("the GPU is older than compute capability 7.5");
  if (operand_type == DType::kBFloat16 && !gpu.has_tensor_code)
    return refuse("bfloat16 needs compute capability 8.0 or newer, and code for it in the library");
  const bool is_float = operand_type == DType::kFloat32;
  const int size = size_for(kL2Table, hidden, is_float);
  const char* obstacle = "";
  for (const L2Line& line : kL2Table) {
    if (line.is_float != is_float || line.largest_hidden != size) continue;
    if (line.is_forward_of_fast &&
        (direction == Direction::kBackward || gpu.shared_bytes < kFastShared))
      continue;
    const int group = line.group(hidden), at_once = gpu.multiprocessors / group;
    const int most = std::min(l2_most_rows(line.units),
                              (gpu.shared_bytes - line.kept_bytes) / l2_row_bytes(line.units));
    if (at_once > 0 && most > 0)
      return {Kernel::kL2, group, line.units, spread_rows(rows, at_once, most), reason};
    obstacle = at_once == 0
                   ? "the GPU, or SB_FAST_SLIGRU_MAX_MULTIPROCESSORS or "
                     "SB_FAST_SLIGRU_MAX_SHARED_KB, has too few multiprocessors, or too little "
                     "shared memory in them, for the blocks that hold the recurrent weight"
                   : "the GPU, or SB_FAST_SLIGRU_MAX_SHARED_KB, has too little shared memory";
  }
  return refuse(obstacle);
}

// The kernel for a layer of `rows` rows, 1 or more. If it is stepwise, the reason says why no other;
// if kL2, why no other but that.
inline KernelChoice choose(int64_t hidden, int64_t rows, DType operand_type, Direction direction,
                           const Gpu& gpu) {
  if (operand_type == DType::kFloat64)
    return refuse("the persistent kernels take float32, bfloat16 and float16 operands only");
  if (hidden < 16 || hidden % 8 != 0)
    return refuse("the hidden size is not a multiple of 8 from 16 on");
  if (hidden > 2048)
    return refuse("the hidden size is above 2048: the recurrent weight does not fit on chip");
  const bool is_float = operand_type == DType::kFloat32;
  if (is_float && hidden > 1024)
    return refuse(
        "the hidden size is above 1024: the recurrent weight in float32 does not fit on chip");

  const auto l2 = [&](const char* reason) {
    return choose_l2(hidden, rows, operand_type, direction, gpu, reason);
  };
  const int size = size_for(kTable, hidden, is_float);
  if (size == 0) return l2("H above 1024: the blocks exchange through the L2 cache");
  if (gpu.capability < 90)
    return l2("no thread-block clusters on this GPU: the blocks exchange through the L2 cache");
  if (!gpu.has_cluster_code)
    return l2(
        "library without cluster code, for 9.0a or the GPU's own architecture: the blocks exchange "
        "through the L2 cache");
  for (const KernelLine& line : kTable) {
    if (line.is_float != is_float || line.largest_hidden != size || !can_run(line, gpu)) continue;
    if (line.when == When::kInOneWave && rows > line.rows * gpu.clusters(line.cluster)) continue;
    if (line.when == When::kIfFaster && microseconds(line, rows, direction, gpu) >=
                                            microseconds(*(&line + 1), rows, direction, gpu))
      continue;
    return {line.kernel, line.cluster, line.units, rows_of_cluster(line, rows, gpu), line.reason};
  }
  return l2(
      "no clusters of the size needed, by the GPU or SB_FAST_SLIGRU_MAX_CLUSTER: the blocks "
      "exchange through the L2 cache");
}

}  // namespace sb_fast_sligru
