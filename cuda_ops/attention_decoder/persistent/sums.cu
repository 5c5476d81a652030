// What the backward pass computes for all tokens at once, before and after its loop.
//
//   before   h_{t-1} and mask_t c_{t-1}: one value a thread
//            f_t of 16 frames: a warp, as in the forward pass
//   after    ds = de v tanh'(s) of some rows and tokens: a warp takes 16 frames and 32 units, whose
//            keys it holds, and goes through the tokens; ds goes to memory for the products with W_f
//            and f, its sum over tokens is the keys' gradient, and the sum of de tanh(s) is v's
//            dF[k] = sum over rows, tokens and frames of df[l] p_{t-1}[l + k - K]: a block takes 8
//            tokens of a row, its warps share the taps; a product on tensor cores with p's window
//            as the second operand
#include "attention_decoder/persistent/window.cuh"

namespace sb_fast_sligru::attention_decoder {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFilterFrames = 256;           // in shared memory at a time
constexpr int kFrameStride = kChannels + 8;  // of df; against bank conflicts

SLIGRU_HD int feature_bytes(int padded_taps) {
  return (kChannels * filter_stride(padded_taps) + kWarps * window_floats(padded_taps)) * 4;
}

SLIGRU_HD int correlation_floats(int padded_taps) { return kFilterFrames + padded_taps; }

SLIGRU_HD int filter_bytes(int padded_taps) {
  return (kFilterFrames * kFrameStride + correlation_floats(padded_taps)) * 4;
}

template <class T>
__global__ void previous_kernel(const Previous p) {
  const Shape& shape = p.shape;
  const int64_t row = blockIdx.x / shape.tokens, token = blockIdx.x % shape.tokens;
  const int64_t H = shape.hidden, C = shape.context;
  T* hidden = static_cast<T*>(p.hidden) + blockIdx.x * H;
  T* masked = static_cast<T*>(p.masked) + blockIdx.x * C;
  const int64_t before = row * shape.tokens + token - 1;
  for (int64_t j = threadIdx.x; j < H; j += blockDim.x)
    hidden[j] = narrow<T>(token > 0 ? p.h[before * H + j] : 0.f);
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
    const float mask = p.context_mask == nullptr ? 1.f : p.context_mask[blockIdx.x * C + j];
    masked[j] = narrow<T>(token > 0 ? mask * p.context[before * C + j] : 0.f);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) features_kernel(const Features p) {
#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = p.shape;
  const int taps = shape.padded_taps(), warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kChannels * taps; i += kThreads)
    shared[i / taps * filter_stride(taps) + i % taps] = p.filters[i];
  __syncthreads();
  float* window = shared + kChannels * filter_stride(taps) + warp * window_floats(taps);
  const int row = blockIdx.x / shape.tokens, token = blockIdx.x % shape.tokens;
  for (int tile = warp; tile < shape.tiles(); tile += kWarps) {
    load_window(shape, p.attention, row, token, tile, window);
    float f[2][4];
    convolve<T>(window, shared, taps, f);
    const int first = tile * kTileFrames;
    store_features(
        f, shape.frames - first,
        static_cast<T*>(p.features) + (int64_t{blockIdx.x} * shape.frames + first) * kChannels);
    __syncwarp();
  }
#endif
}

template <class T>
__global__ void __launch_bounds__(kThreads) scores_kernel(const Scores p) {
#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS
  const Shape& shape = p.shape;
  const int64_t A = shape.attention, L = shape.frames;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int unit_tiles = shape.attention / kTileUnits;
  const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (item >= int64_t{p.rows} * shape.tiles() * unit_tiles) return;
  const int unit = static_cast<int>(item % unit_tiles) * kTileUnits, mine = unit + 8 * c;
  const int tile = static_cast<int>(item / unit_tiles % shape.tiles());
  const int64_t local = item / unit_tiles / shape.tiles(), row = p.first_row + local;
  const int first = tile * kTileFrames, last = shape.frames - 1;

  const LocationWeights<T> location(static_cast<const T*>(p.w_location) + unit * kChannels);
  const T* keys = static_cast<const T*>(p.keys) + row * L * A + mine;
  const Eight<T> key_g = Eight<T>::load(keys + min(first + g, last) * A);
  const Eight<T> key_g8 = Eight<T>::load(keys + min(first + g + 8, last) * A);
  const Eight<float> v = Eight<float>::load(p.v + mine);
  float keys_sum[4][4] = {}, v_sum[4][2] = {};
  for (int t = 0; t < p.tokens; ++t) {
    const int64_t token = row * shape.tokens + p.first_token + t;
    const Eight<float> q = Eight<float>::load(p.query + token * A + mine);
    const LocationFeatures<T> f(static_cast<const T*>(p.features) + (token * L + first) * kChannels,
                                last - first);
    const float* de = p.de + token * L + first;
    const float weight[2] = {first + g <= last ? __ldg(de + g) : 0.f,
                             first + g + 8 <= last ? __ldg(de + g + 8) : 0.f};
    float s[4][4], ds[4][4];
    compute_scores(key_g, key_g8, q, f, location, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 factor = v.pair(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Tanh y = tanh_parts<T>(s[j][i]);
        ds[j][i] = weight[i / 2] * (i % 2 ? factor.y : factor.x) * y.slope;
        keys_sum[j][i] += ds[j][i];
        v_sum[j][i % 2] += weight[i / 2] * y.value;
      }
    }
    T* to = static_cast<T*>(p.ds) + ((local * p.tokens + t) * L + first) * A + mine;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int frame = g + 8 * half;
      if (first + frame > last) continue;
      uint4* words = reinterpret_cast<uint4*>(to + frame * A);
      if constexpr (kIsFloat<T>) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          words[j / 2] = make_uint4(
              __float_as_uint(ds[j][2 * half]), __float_as_uint(ds[j][2 * half + 1]),
              __float_as_uint(ds[j + 1][2 * half]), __float_as_uint(ds[j + 1][2 * half + 1]));
        }
      } else {
        auto pack = [&](int j) {
          return OperandTraits<T>::pack(ds[j][2 * half], ds[j][2 * half + 1]);
        };
        words[0] = make_uint4(pack(0), pack(1), pack(2), pack(3));
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int frame = first + g + 8 * half;
    if (p.keys_gradient == nullptr || frame > last) continue;
    float4* to = reinterpret_cast<float4*>(p.keys_gradient + (row * L + frame) * A + mine);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      float4 x = to[j / 2];
      x.x += keys_sum[j][2 * half];
      x.y += keys_sum[j][2 * half + 1];
      x.z += keys_sum[j + 1][2 * half];
      x.w += keys_sum[j + 1][2 * half + 1];
      to[j / 2] = x;
    }
  }
  float* v_gradient = p.v_gradient + (row * shape.tiles() + tile) * A + mine;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = sum_over_groups(v_sum[j][i]);
      if (g == 0) v_gradient[2 * j + i] += x;
    }
  }
#endif
}

__global__ void __launch_bounds__(kThreads) filters_kernel(const Filters p) {
#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS
  constexpr int kTapTiles = 4;  // of 8 taps, of a warp at a time
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = p.shape;
  const int taps = shape.padded_taps(), L = shape.frames;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  float* df = shared;
  float* window = shared + kFilterFrames * kFrameStride;
  const int groups = static_cast<int>(ceil_div(shape.tokens, Filters::kTokens));
  const int row = blockIdx.x / groups, first_token = blockIdx.x % groups * Filters::kTokens;
  const int length = length_of(shape, row);
  const float even = 1.f / static_cast<float>(length);
  float* gradients = p.gradients + int64_t{blockIdx.x} * kChannels * taps;
  // Warps take kTapTiles tiles of 8 taps in turn; all of them go through the loop, for its barriers.
  for (int base = 0; base < taps / 8; base += kWarps * kTapTiles) {
    const int first_tile = base + threadIdx.x / 32 * kTapTiles;
    float sums[kTapTiles][4] = {};
    for (int token = first_token; token < min(first_token + Filters::kTokens, shape.tokens);
         ++token) {
      const int64_t index = int64_t{row} * shape.tokens + token;
      for (int first = 0; first < L; first += kFilterFrames) {
        __syncthreads();
        for (int i = threadIdx.x; i < kFilterFrames * kChannels; i += kThreads) {
          const int frame = first + i / kChannels;
          df[i / kChannels * kFrameStride + i % kChannels] =
              frame < L ? p.df[(index * L + frame) * kChannels + i % kChannels] : 0.f;
        }
        for (int i = threadIdx.x; i < correlation_floats(taps); i += kThreads) {
          const int frame = first - shape.taps / 2 + i;
          const bool inside = frame >= 0 && frame < L;
          window[i] = !inside      ? 0.f
                      : token == 0 ? (frame < length ? 1.f : 0.f) * even
                                   : p.attention[(index - 1) * L + frame];
        }
        __syncthreads();
        for (int k = c; k < ceil_div(min(kFilterFrames, L - first), 8) * 8; k += 8) {
          const SplitTf32 a[4] = {split_tf32(df[k * kFrameStride + g]),
                                  split_tf32(df[k * kFrameStride + g + 8]),
                                  split_tf32(df[(k + 4) * kFrameStride + g]),
                                  split_tf32(df[(k + 4) * kFrameStride + g + 8])};
#pragma unroll
          for (int n = 0; n < kTapTiles; ++n) {
            if (first_tile + n >= taps / 8) continue;
            const float* p_previous = window + k + (first_tile + n) * 8 + g;
            multiply_split(sums[n], a, split_tf32(p_previous[0]), split_tf32(p_previous[4]));
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTapTiles; ++n) {
      if (first_tile + n >= taps / 8) continue;
      float* to = gradients + g * taps + (first_tile + n) * 8 + 2 * c;
      to[0] = sums[n][0];
      to[1] = sums[n][1];
      to[8 * taps] = sums[n][2];
      to[8 * taps + 1] = sums[n][3];
    }
  }
#endif
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int dynamic_bytes, const Params& params,
                   cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, dynamic_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gather_previous(const Previous& p, cudaStream_t stream) {
  return with_operand(p.shape.operand_type, [&](auto operand) {
    return launch(previous_kernel<decltype(operand)>, int64_t{p.shape.batch} * p.shape.tokens, 0, p,
                  stream);
  });
}

cudaError_t location_features(const Features& p, cudaStream_t stream) {
  return with_operand(p.shape.operand_type, [&](auto operand) {
    return launch(features_kernel<decltype(operand)>, int64_t{p.shape.batch} * p.shape.tokens,
                  feature_bytes(p.shape.padded_taps()), p, stream);
  });
}

cudaError_t score_gradients(const Scores& p, cudaStream_t stream) {
  const int64_t items = int64_t{p.rows} * p.shape.tiles() * (p.shape.attention / kTileUnits);
  return with_operand(p.shape.operand_type, [&](auto operand) {
    return launch(scores_kernel<decltype(operand)>, ceil_div(items, kWarps), 0, p, stream);
  });
}

cudaError_t filter_gradients(const Filters& p, cudaStream_t stream) {
  return launch(filters_kernel, p.parts(), filter_bytes(p.shape.padded_taps()), p, stream);
}

}  // namespace sb_fast_sligru::attention_decoder
