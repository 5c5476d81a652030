// Tiles of the result whose sums stay in registers, along K eight lanes each; columns of tiles go to
// threads. With few rows the weights come from memory, each once: while a tile is computed, those of
// the next are on their way. x is read again for each tile, so it lies in the order of reading; rows
// as they are would, at strides of powers of 2, share a few places of the first cache.
#include <memory>

#include "common/cpu_loops.h"
#include "few_rows/few_rows.h"

namespace sb_fast_sligru::few_rows::cpu {
namespace {

using namespace sb_fast_sligru::cpu;

constexpr int64_t kLanes = 8;     // of a vector: wider ones were no faster
constexpr int64_t kStep = 16;     // of K: the floats of a line of a cache
constexpr int64_t kBlock = 1024;  // of K, summed on its own: long sums lose digits

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// Rows and outputs of a tile: as many sums as registers hold beside what is multiplied.
struct ManyRegisters {  // 32
  static constexpr int kRows = 4, kOutputs = 6;
};
struct FewRegisters {  // 16
  static constexpr int kRows = 2, kOutputs = 4;
};

bool has_many_registers() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512vl");
  return has;
#else
  return true;
#endif
}

int64_t padded(int64_t depth) { return ceil_div(depth, kStep) * kStep; }

struct alignas(kStep * sizeof(float)) Line {
  float values[kStep];
};

// Blocks of rows, each [K / kLanes, rows of the block, kLanes], zeros behind K.
template <class Shape>
SLIGRU_HD void pack(const Linear& p, float* packed) {
  const int64_t depth = padded(p.depth);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t block = row / Shape::kRows * Shape::kRows;
    const int64_t rows = std::min<int64_t>(Shape::kRows, p.rows - block);
    const float* from = p.x + row * p.x_row;
    float* to = packed + block * depth + (row - block) * kLanes;
    for (int64_t k = 0; k < depth; k += kLanes, to += rows * kLanes) {
      const int64_t n = std::clamp<int64_t>(p.depth - k, 0, kLanes);
      std::copy(from + k, from + k + n, to);
      std::fill(to + n, to + kLanes, 0.0f);
    }
  }
}

// Lines of memory that will be wanted, some of them a step.
struct Prefetch {
  const float* next;
  int64_t lines;

  SLIGRU_HD void step() {
    for (int64_t i = 0; i < lines; ++i, next += kStep) __builtin_prefetch(next, 0, 2);
  }
};

template <int kRows, int kOutputs>
SLIGRU_HD void add_step(const float* x, const float* w, int64_t w_row,
                        Vector (&sums)[kRows][kOutputs]) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < kStep; k += kLanes) {
    Vector weights[kOutputs];
#pragma GCC unroll 8
    for (int m = 0; m < kOutputs; ++m) std::memcpy(&weights[m], w + m * w_row + k, sizeof(Vector));
#pragma GCC unroll 8
    for (int n = 0; n < kRows; ++n) {
      Vector row;
      std::memcpy(&row, x + k * kRows + n * kLanes, sizeof(Vector));
#pragma GCC unroll 8
      for (int m = 0; m < kOutputs; ++m) sums[n][m] += row * weights[m];
    }
  }
}

SLIGRU_HD float sum_of(const Vector& v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(lanes));
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Adds what the depths from `begin` to `end` give.
template <int kRows, int kOutputs>
SLIGRU_HD void add_block(const float* x, const float* w, int64_t w_row, int64_t begin, int64_t end,
                         Prefetch& prefetch, float* out, int64_t out_row) {
  Vector sums[kRows][kOutputs] = {};
  int64_t k = begin;
  for (; k + kStep <= end; k += kStep) {
    prefetch.step();
    add_step(x + k * kRows, w + k, w_row, sums);
  }
  if (k < end) {
    float rest[kOutputs * kStep] = {};
    for (int m = 0; m < kOutputs; ++m)
      std::copy(w + m * w_row + k, w + m * w_row + end, rest + m * kStep);
    add_step(x + k * kRows, rest, kStep, sums);
  }
#pragma GCC unroll 8
  for (int n = 0; n < kRows; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < kOutputs; ++m) out[n * out_row + m] += sum_of(sums[n][m]);
}

template <int kRows, int kOutputs>
SLIGRU_HD void tile(const Linear& p, const float* packed, int64_t row, int64_t output,
                    Prefetch& prefetch) {
  const float* x = packed + row * padded(p.depth);
  const float* w = p.weight + output * p.depth;
  float* out = p.out + row * p.outputs + output;
  for (int n = 0; n < kRows; ++n)
    copy_or_fill(at<float>(p.bias, output), 0.0f, kOutputs, out + n * p.outputs);
  for (int64_t k = 0; k < p.depth; k += kBlock)
    add_block<kRows, kOutputs>(x, w, p.depth, k, std::min(k + kBlock, p.depth), prefetch, out,
                               p.outputs);
}

// The rows from `row` on, in tiles of kRows and one of those that are left.
template <int kRows, int kOutputs>
SLIGRU_HD void tiles(const Linear& p, const float* packed, int64_t row, int64_t output,
                     Prefetch& prefetch) {
  for (; row + kRows <= p.rows; row += kRows)
    tile<kRows, kOutputs>(p, packed, row, output, prefetch);
  if constexpr (kRows > 1)
    if (row < p.rows) tiles<kRows - 1, kOutputs>(p, packed, row, output, prefetch);
}

template <class Shape>
SLIGRU_HD void linear_range(const Linear& p, const float* packed, int64_t begin,
                            int64_t end) {  // of kOutputs each
  constexpr int kRows = Shape::kRows, kOutputs = Shape::kOutputs;
  const int64_t lines = ceil_div(kOutputs, ceil_div(p.rows, kRows));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * kOutputs, last = std::min(first + kOutputs, p.outputs);
    Prefetch prefetch = {p.weight + last * p.depth, lines};
    if (last == first + kOutputs) {
      tiles<kRows, kOutputs>(p, packed, 0, first, prefetch);
    } else {
      for (int64_t m = first; m < last; ++m) tiles<kRows, 1>(p, packed, 0, m, prefetch);
    }
  }
}

VECTOR_CLONES
void with_many_registers(const Linear& p, const float* packed, int64_t begin, int64_t end) {
  linear_range<ManyRegisters>(p, packed, begin, end);
}
VECTOR_CLONES
void with_few_registers(const Linear& p, const float* packed, int64_t begin, int64_t end) {
  linear_range<FewRegisters>(p, packed, begin, end);
}

}  // namespace

bool has_wide_vectors() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
#else
  return false;
#endif
}

void linear(const Linear& p) {
  if (p.rows == 0 || p.outputs == 0) return;
  const bool many = has_many_registers();
  const std::unique_ptr<Line[]> lines(new Line[p.rows * padded(p.depth) / kStep]);
  float* packed = lines[0].values;
  many ? pack<ManyRegisters>(p, packed) : pack<FewRegisters>(p, packed);
  const int64_t outputs = many ? ManyRegisters::kOutputs : FewRegisters::kOutputs;
  // So many multiply-adds cost about as much as an element of other kernels. To read a weight
  // costs some too.
  constexpr int64_t kMultiplyAdds = 256, kOfReading = 4;
  const int64_t elements = std::max(p.rows, kOfReading) * p.depth * outputs / kMultiplyAdds;
  const auto kernel = many ? with_many_registers : with_few_registers;
  for_rows(0, ceil_div(p.outputs, outputs), elements,
           [&](int64_t begin, int64_t end) { kernel(p, packed, begin, end); });
}

}  // namespace sb_fast_sligru::few_rows::cpu
