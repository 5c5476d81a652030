// The backward pass on CUDA GPUs; norm_pool.h has the mathematics.
//
// Layout: as many blocks as run at once share the groups, group after group; a block is a part of the
// sums. A thread has the same values of every frame, so that the sums of the parameters' gradients
// over a block's frames stay with it and leave the block once, at the end; no atomics, and the order
// of additions is fixed. In a window of several values the first largest is found before its
// frames' turn, for which those are read twice, the second time from a cache.
#include "common/gpu.h"
#include "norm_pool/frame.cuh"

namespace sb_fast_sligru::norm_pool::cuda {
namespace {

// Where in its window the first largest value is, for each channel of an item.
template <class X, int kVector, int kPool>
__device__ __forceinline__ void find_winners(
    const NormPool& layer, const Share<kVector, kPool>& mine, const X* x, const float2* statistics,
    const float (&bias)[kVector], int (&winner)[Share<kVector, kPool>::kItems][kVector]) {
  constexpr int kItems = Share<kVector, kPool>::kItems;
  const int N = static_cast<int>(layer.values()), frames = static_cast<int>(layer.pool_time);
  const float slope = static_cast<float>(layer.slope);
  float largest[kItems][kVector];
  for (int k = 0; k < frames; k++, x += N) {
    const float2 s = statistics[k];  // mean, rstd
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      if (!mine.has_window(i)) continue;
#pragma unroll
      for (int j = 0; j < kPool; j++) {
        float value[kVector], weight[kVector], shift[kVector];
        load(x + mine.offset(i, j), value);
        load(static_cast<const float*>(layer.ln_weight) + mine.offset(i, j), weight);
        load(static_cast<const float*>(layer.ln_bias) + mine.offset(i, j), shift);
#pragma unroll
        for (int c = 0; c < kVector; c++) {
          // As in the forward, to the bit: what won there wins here.
          const float a = leaky(fmaf((value[c] + bias[c] - s.x) * s.y, weight[c], shift[c]), slope);
          if ((k == 0 && j == 0) || exceeds(a, largest[i][c])) {
            largest[i][c] = a;
            winner[i][c] = k * kPool + j;
          }
        }
      }
    }
  }
}

// The gradient of the window at (t, f): what the output's copies of it have, times the mask.
template <class Out, int kVector, int kPool>
__device__ __forceinline__ void gather_gradient(const Backward& p,
                                                const Share<kVector, kPool>& mine, int64_t batch,
                                                int64_t t, int f, float (&g)[kVector]) {
  const NormPool& layer = p.layer;
  const Out* grad = static_cast<const Out*>(p.grad_out) +
                    batch * layer.out_time() * layer.out_frequencies() * layer.channels;
#pragma unroll
  for (int c = 0; c < kVector; c++) g[c] = 0.f;
  for (int copy = 0; copy < kCopies; copy++) {  // the same for the whole block
    const int64_t from_t = position(t, layer.pooled_time(), layer.halo, copy);
    if (from_t < 0) continue;
    const Out* row = grad + from_t * layer.out_frequencies() * layer.channels + mine.channel;
#pragma unroll
    for (int other = 0; other < kCopies; other++) {
      const int64_t from_f = position(f, mine.windows, layer.halo, other);
      if (from_f < 0) continue;
      float part[kVector];
      load(row + from_f * layer.channels, part);
#pragma unroll
      for (int c = 0; c < kVector; c++) g[c] += part[c];
    }
  }
  if (layer.drop_mask != nullptr) {
    const float factor = static_cast<const float*>(layer.drop_mask)[batch * mine.windows + f];
#pragma unroll
    for (int c = 0; c < kVector; c++) g[c] *= factor;
  }
}

// What a thread adds up over frames, in shared memory, where no other thread touches it: registers
// would not hold it. Vectors of a thread lie apart, the same one of all threads side by side.
template <int kVector>
struct Sums {
  float* memory;
  int threads, thread;

  static constexpr int kPart = kVector == 1 ? 1 : 4;  // values that are read at once

  __device__ __forceinline__ float* part(int vector, int i) const {
    return memory + ((vector * (kVector / kPart) + i) * threads + thread) * kPart;
  }
  __device__ __forceinline__ void read(int vector, float (&to)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector / kPart; i++) {
      float values[kPart];
      load(part(vector, i), values);
#pragma unroll
      for (int c = 0; c < kPart; c++) to[i * kPart + c] = values[c];
    }
  }
  __device__ __forceinline__ void write(int vector, const float (&from)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector / kPart; i++) {
      float values[kPart];
#pragma unroll
      for (int c = 0; c < kPart; c++) values[c] = from[i * kPart + c];
      store(values, part(vector, i));
    }
  }
};

// kSearch: windows have more than one value.
template <class X, class Out, int kVector, int kPool, bool kSearch>
__global__ void __launch_bounds__(kMostThreads)
    backward_kernel(const Backward p, int columns, int rows) {
  using Mine = Share<kVector, kPool>;
  constexpr int kItems = Mine::kItems;
  __shared__ BlockSums sums, projections;
  extern __shared__ float4 memory[];
  const NormPool& layer = p.layer;
  const Mine mine(layer, columns, rows);
  const Sums<kVector> totals{reinterpret_cast<float*>(memory), static_cast<int>(blockDim.x),
                             static_cast<int>(threadIdx.x)};
  // Vectors of `totals`: those of ln_weight's gradient, then ln_bias's.
  auto weight_total = [](int i, int j) { return i * kPool + j; };
  auto shift_total = [](int i, int j) { return (kItems + i) * kPool + j; };
  const int64_t times = layer.pooled_time();
  const int N = static_cast<int>(layer.values()), frames = static_cast<int>(layer.pool_time);
  const float slope = static_cast<float>(layer.slope);
  const float *weights = static_cast<const float*>(layer.ln_weight),
              *shifts = static_cast<const float*>(layer.ln_bias);
  const float zeros[kVector] = {};
  float bias[kVector], bias_total[kVector] = {};
  load(static_cast<const float*>(layer.bias) + mine.channel, bias);
#pragma unroll
  for (int vector = 0; vector < 2 * kItems * kPool; vector++) totals.write(vector, zeros);

  for (int64_t group = blockIdx.x; group < layer.groups(); group += gridDim.x) {
    const int64_t batch = group / times, t = group % times;
    const int64_t first = batch * layer.x_time + t * frames;  // of its frames
    const X* x = static_cast<const X*>(layer.x) + first * N;
    X* grad_x = p.grad_x == nullptr ? nullptr : static_cast<X*>(p.grad_x) + first * N;
    const float2* statistics = static_cast<const float2*>(p.statistics) + group * frames;
    int winner[kItems][kVector];
    if constexpr (kSearch) find_winners(layer, mine, x, statistics, bias, winner);

    for (int k = 0; k < frames; k++, x += N) {
      const float2 s = statistics[k];  // mean, rstd
      float e[kItems][kPool][kVector];
      float sum = 0.f, projection = 0.f;
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        float g[kVector] = {};
        if (mine.has_window(i)) gather_gradient<Out>(p, mine, batch, t, mine.window(i), g);
#pragma unroll
        for (int j = 0; j < kPool; j++) {
          if (!mine.has(i, j)) continue;
          float value[kVector], weight[kVector], shift[kVector], total[kVector];
          load(x + mine.offset(i, j), value);
          load(weights + mine.offset(i, j), weight);
          load(shifts + mine.offset(i, j), shift);
          float dz[kVector];
#pragma unroll
          for (int c = 0; c < kVector; c++) {
            value[c] = (value[c] + bias[c] - s.x) * s.y;
            const bool wins = !kSearch || !mine.has_window(i) || winner[i][c] == k * kPool + j;
            const float received = wins ? g[c] : 0.f;
            dz[c] = fmaf(value[c], weight[c], shift[c]) > 0.f ? received : slope * received;
            e[i][j][c] = dz[c] * weight[c];
            sum += e[i][j][c];
            projection = fmaf(e[i][j][c], value[c], projection);
          }
          totals.read(weight_total(i, j), total);
#pragma unroll
          for (int c = 0; c < kVector; c++) total[c] = fmaf(dz[c], value[c], total[c]);
          totals.write(weight_total(i, j), total);
          totals.read(shift_total(i, j), total);
#pragma unroll
          for (int c = 0; c < kVector; c++) total[c] += dz[c];
          totals.write(shift_total(i, j), total);
        }
      }
      const float mean = block_sum(sum, sums) / static_cast<float>(N);
      const float slant = block_sum(projection, projections) / static_cast<float>(N);
#pragma unroll
      for (int i = 0; i < kItems; i++)
#pragma unroll
        for (int j = 0; j < kPool; j++) {
          if (!mine.has(i, j)) continue;
          float value[kVector];  // once more, from a cache
          load(x + mine.offset(i, j), value);
#pragma unroll
          for (int c = 0; c < kVector; c++) {
            const float xh = (value[c] + bias[c] - s.x) * s.y;
            e[i][j][c] = s.y * (e[i][j][c] - mean - xh * slant);
            bias_total[c] += e[i][j][c];
          }
          if (grad_x != nullptr) store(e[i][j], grad_x + k * N + mine.offset(i, j));
        }
    }

    if (t == times - 1 && grad_x != nullptr) {  // frames that fill no window or do not count
      for (int64_t k = frames; first + k < (batch + 1) * layer.x_time; k++)
#pragma unroll
        for (int i = 0; i < kItems; i++)
#pragma unroll
          for (int j = 0; j < kPool; j++)
            if (mine.has(i, j)) store(zeros, grad_x + k * N + mine.offset(i, j));
    }
  }

  const int64_t part = blockIdx.x;
#pragma unroll
  for (int i = 0; i < kItems; i++)
#pragma unroll
    for (int j = 0; j < kPool; j++) {
      if (!mine.has(i, j)) continue;
      float total[kVector];
      totals.read(weight_total(i, j), total);
      store(total, static_cast<float*>(p.ln_weight_sums) + part * N + mine.offset(i, j));
      totals.read(shift_total(i, j), total);
      store(total, static_cast<float*>(p.ln_bias_sums) + part * N + mine.offset(i, j));
    }
  // The threads of a channel add up theirs: rows of channels in the memory of `totals`.
  __syncthreads();
  float* bias_rows = reinterpret_cast<float*>(memory);
  if (mine.row < rows) store(bias_total, bias_rows + mine.row * mine.channels + mine.channel);
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < mine.channels;
       c += static_cast<int>(blockDim.x)) {
    float total = 0.f;
    for (int row = 0; row < rows; row++) total += bias_rows[row * mine.channels + c];
    static_cast<float*>(p.bias_sums)[part * mine.channels + c] = total;
  }
}

using Kernel = void (*)(Backward, int, int);

// The kernel of a layer, ready for the shared memory that it needs.
Kernel kernel_for(const NormPool& layer, const Layout& layout) {
  Kernel kernel = nullptr;
  dispatch(layer, layout, [&](auto x, auto out, auto vector, auto pool) {
    constexpr int kVector = decltype(vector)::value, kPool = decltype(pool)::value;
    kernel = backward_kernel<decltype(x), decltype(out), kVector, kPool, true>;
    if constexpr (kPool == 1)
      if (layer.window() == 1)
        kernel = backward_kernel<decltype(x), decltype(out), kVector, kPool, false>;
  });
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             layout.shared_bytes()));
  return kernel;
}

Layout layout_of(const NormPool& d) {
  return layout(d.x_type, d.frequencies, d.channels, d.pool_frequency);
}

}  // namespace

// As many blocks as run at once.
int64_t backward_parts(const NormPool& layer) {
  const Layout layout = layout_of(layer);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_for(layer, layout),
                                                      layout.threads(), layout.shared_bytes()));
  return std::min<int64_t>(layer.groups(),
                           int64_t{current_gpu().multiprocessors} * std::max(blocks, 1));
}

void backward(const Backward& p, void* stream) {
  const Layout layout = layout_of(p.layer);
  kernel_for(p.layer, layout)<<<static_cast<unsigned>(p.parts), layout.threads(),
                                layout.shared_bytes(), static_cast<cudaStream_t>(stream)>>>(
      p, layout.columns, layout.rows);
  check(cudaGetLastError());
}

}  // namespace sb_fast_sligru::norm_pool::cuda
