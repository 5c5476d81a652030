// The forward pass on CUDA GPUs; norm_pool.h has the mathematics.
//
// Layout: a block has a group, one frame after the other, in registers: it is read once. Its mean
// comes first and then the mean square distance from it. The largest values of the windows so far
// stay in registers; each thread writes its windows, to the halo too.
#include "norm_pool/frame.cuh"

namespace sb_fast_sligru::norm_pool::cuda {
namespace {

template <class X, class Out, int kVector, int kPool>
__global__ void __launch_bounds__(kMostThreads)
    forward_kernel(const Forward p, int columns, int rows) {
  using Mine = Share<kVector, kPool>;
  constexpr int kItems = Mine::kItems;
  __shared__ BlockSums sums, squares;
  const NormPool& layer = p.layer;
  const Mine mine(layer, columns, rows);
  const int64_t group = blockIdx.x, times = layer.pooled_time();
  const int64_t batch = group / times, t = group % times;
  const int N = static_cast<int>(layer.values()), frames = static_cast<int>(layer.pool_time);
  const float slope = static_cast<float>(layer.slope);
  const float *weights = static_cast<const float*>(layer.ln_weight),
              *shifts = static_cast<const float*>(layer.ln_bias);
  float bias[kVector];
  load(static_cast<const float*>(layer.bias) + mine.channel, bias);
  float largest[kItems][kVector];

  const X* x = static_cast<const X*>(layer.x) + (batch * layer.x_time + t * frames) * N;
  for (int k = 0; k < frames; k++, x += N) {
    float value[kItems][kPool][kVector];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kItems; i++)
#pragma unroll
      for (int j = 0; j < kPool; j++)
        if (mine.has(i, j)) load(x + mine.offset(i, j), value[i][j]);
#pragma unroll
    for (int i = 0; i < kItems; i++)
#pragma unroll
      for (int j = 0; j < kPool; j++)
        if (mine.has(i, j))
#pragma unroll
          for (int c = 0; c < kVector; c++) sum += value[i][j][c] += bias[c];
    const float mean = block_sum(sum, sums) / static_cast<float>(N);

    float square = 0.f;
#pragma unroll
    for (int i = 0; i < kItems; i++)
#pragma unroll
      for (int j = 0; j < kPool; j++)
        if (mine.has(i, j))
#pragma unroll
          for (int c = 0; c < kVector; c++) {
            value[i][j][c] -= mean;
            square += value[i][j][c] * value[i][j][c];
          }
    const float variance = block_sum(square, squares) / static_cast<float>(N);
    const float rstd = 1.f / sqrtf(variance + static_cast<float>(layer.eps));
    if (threadIdx.x == 0)
      static_cast<float2*>(p.statistics)[group * frames + k] = make_float2(mean, rstd);

#pragma unroll
    for (int i = 0; i < kItems; i++) {
      if (!mine.has_window(i)) continue;
#pragma unroll
      for (int j = 0; j < kPool; j++) {
        float weight[kVector], shift[kVector];
        load(weights + mine.offset(i, j), weight);
        load(shifts + mine.offset(i, j), shift);
#pragma unroll
        for (int c = 0; c < kVector; c++) {
          const float a = leaky(fmaf(value[i][j][c] * rstd, weight[c], shift[c]), slope);
          if ((k == 0 && j == 0) || exceeds(a, largest[i][c])) largest[i][c] = a;
        }
      }
    }
  }

  const float* mask = static_cast<const float*>(layer.drop_mask);
  Out* out = static_cast<Out*>(p.out) +
             batch * layer.out_time() * layer.out_frequencies() * layer.channels;
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    if (!mine.has_window(i)) continue;
    const int f = mine.window(i);
    if (mask != nullptr) {
      const float factor = mask[batch * mine.windows + f];
#pragma unroll
      for (int c = 0; c < kVector; c++) largest[i][c] *= factor;
    }
    for (int copy = 0; copy < kCopies; copy++) {  // the same for the whole block
      const int64_t to_t = position(t, times, layer.halo, copy);
      if (to_t < 0) continue;
      Out* row = out + to_t * layer.out_frequencies() * layer.channels + mine.channel;
#pragma unroll
      for (int other = 0; other < kCopies; other++) {
        const int64_t to_f = position(f, mine.windows, layer.halo, other);
        if (to_f >= 0) store(largest[i], row + to_f * layer.channels);
      }
    }
  }

  // Frames that are none of its own, each by the block of another group.
  const int64_t frame = layer.out_frequencies() * layer.channels;
  for (int64_t to_t = layer.own_out_time() + t; to_t < layer.out_time(); to_t += times)
    for (int64_t i = threadIdx.x; i < frame; i += blockDim.x)
      out[to_t * frame + i] = narrow<Out>(0.f);
}

}  // namespace

void forward(const Forward& p, void* stream) {
  const NormPool& d = p.layer;
  const Layout layout = cuda::layout(d.x_type, d.frequencies, d.channels, d.pool_frequency);
  dispatch(d, layout, [&](auto x, auto out, auto vector, auto pool) {
    forward_kernel<decltype(x), decltype(out), decltype(vector)::value, decltype(pool)::value>
        <<<static_cast<unsigned>(d.groups()), layout.threads(), 0,
           static_cast<cudaStream_t>(stream)>>>(p, layout.columns, layout.rows);
    check(cudaGetLastError());
  });
}

}  // namespace sb_fast_sligru::norm_pool::cuda
