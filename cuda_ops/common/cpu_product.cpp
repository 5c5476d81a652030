// Tiles of the result whose sums stay in registers; tiles go to threads.
#include "common/cpu_product.h"

#include "common/cpu_loops.h"

namespace sb_fast_sligru::cpu {
namespace {

constexpr int64_t kVectorBytes = 64, kTileRows = 8;
constexpr int64_t kTaskRows = 64;  // of a column of tiles, which one thread computes

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
constexpr int64_t tile_columns() {
  return kVectorBytes / static_cast<int64_t>(sizeof(T));
}

// kRows x a whole tile of columns: the sums stay in registers.
template <class T, int kRows>
SLIGRU_HD void whole_tile(const Product& p, const T* x, const T* w, T* out) {
  using Vector = typename VectorOf<T>::type;
  Vector sums[kRows] = {};
  for (int64_t k = 0; k < p.depth; ++k) {
    Vector operand;
    std::memcpy(&operand, w + k * p.w_depth, sizeof(operand));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r] += x[r * p.x_row + k * p.x_depth] * operand;
  }
  for (int r = 0; r < kRows; ++r) std::memcpy(out + r * p.out_row, &sums[r], sizeof(sums[r]));
}

// As many rows at once as are left.
template <class T, int kRows>
SLIGRU_HD void whole_tiles(const Product& p, const T* x, const T* w, int64_t rows, T* out) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    whole_tile<T, kRows>(p, x + row * p.x_row, w, out + row * p.out_row);
  if constexpr (kRows > 1)
    whole_tiles<T, kRows / 2>(p, x + row * p.x_row, w, rows - row, out + row * p.out_row);
}

template <class T>
SLIGRU_HD void part_of_tile(const Product& p, const T* x, const T* w, int64_t columns, T* out) {
  std::fill(out, out + columns, T(0));
  for (int64_t k = 0; k < p.depth; ++k) {
    const T scale = x[k * p.x_depth];
    const T* operand = w + k * p.w_depth;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) out[c] += scale * operand[c];
  }
}

struct ProductTasks {
  int64_t across, down, count;  // tiles of columns, blocks of rows, both of all batches

  template <class T>
  static ProductTasks of(const Product& p) {
    const int64_t across = ceil_div(p.columns, tile_columns<T>()),
                  down = ceil_div(p.rows, kTaskRows);
    return {across, down, p.batches * down * across};
  }
};

template <class T>
SLIGRU_HD void product_tasks(const Product& p, const ProductTasks& tasks, int64_t begin,
                             int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / (tasks.down * tasks.across),
                  column = task % tasks.across * tile_columns<T>(),
                  first = task / tasks.across % tasks.down * kTaskRows;
    const int64_t rows = std::min(kTaskRows, p.rows - first),
                  columns = std::min(tile_columns<T>(), p.columns - column);
    const T* x = at<T>(p.x, batch * p.x_batch + first * p.x_row);
    const T* w = at<T>(p.w, batch * p.w_batch + column);
    T* out = at<T>(p.out, batch * p.out_batch + first * p.out_row + column);
    if (columns == tile_columns<T>()) {
      whole_tiles<T, kTileRows>(p, x, w, rows, out);
    } else {
      for (int64_t row = 0; row < rows; ++row)
        part_of_tile(p, x + row * p.x_row, w, columns, out + row * p.out_row);
    }
  }
}

VECTOR_CLONES
void product_tasks_float(const Product& p, const ProductTasks& tasks, int64_t begin, int64_t end) {
  product_tasks<float>(p, tasks, begin, end);
}

VECTOR_CLONES
void product_tasks_double(const Product& p, const ProductTasks& tasks, int64_t begin, int64_t end) {
  product_tasks<double>(p, tasks, begin, end);
}

}  // namespace

void multiply(const Product& p) {
  const bool wide = p.type == DType::kFloat64;
  const ProductTasks tasks = wide ? ProductTasks::of<double>(p) : ProductTasks::of<float>(p);
  // So many multiply-adds cost about as much as an element of other kernels.
  constexpr int64_t kMultiplyAdds = 256;
  const int64_t columns = wide ? tile_columns<double>() : tile_columns<float>();
  const int64_t elements = std::min(p.rows, kTaskRows) * p.depth * columns / kMultiplyAdds;
  for_rows(0, tasks.count, elements, [&](int64_t begin, int64_t end) {
    wide ? product_tasks_double(p, tasks, begin, end) : product_tasks_float(p, tasks, begin, end);
  });
}

}  // namespace sb_fast_sligru::cpu
