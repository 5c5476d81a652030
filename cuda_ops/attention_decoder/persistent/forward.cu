// The forward pass over all tokens in one launch, one block a multiprocessor.
//
// A token has five phases, after each of which all blocks meet:
//
//   cell      h_t: a block computes the three gates of 8 units, for 32 rows of the batch
//   query     W_q h_t: 8 units
//   energies  e = v . tanh(key + W_q h_t + W_f f) of tiles of 16 frames; the warps share the units
//   summary   p = softmax(e) and sum_l p_l value_l: four warps take a chunk of the values' width and
//             share the frames; each computes the row's softmax for itself
//   context   W_o of it: 8 units; also what the next token's cell reads
//
// Weights, keys and values are read anew at every token, from L2 where they fit. Phases hand each
// other their results through global memory (Forward in persistent.h).
#include "attention_decoder/persistent/products.cuh"
#include "attention_decoder/persistent/window.cuh"
#include "common/cooperative_launch.cuh"
#include "common/grid_barrier.cuh"

namespace sb_fast_sligru::attention_decoder {
namespace {

constexpr int kWarps = kSkinnyWarps, kThreads = 32 * kWarps;
constexpr int kGates = 4;  // sums of the cell: r, z, and the two parts of n

// Shared memory: the filters for good, then what a phase needs.
struct Layout {
  int filter_bytes, window_bytes, feature_bytes;

  SLIGRU_HD explicit Layout(const Shape& shape, int operand_bytes)
      : filter_bytes(kChannels * filter_stride(shape.padded_taps()) * 4),
        window_bytes(kWarps * window_floats(shape.padded_taps()) * 4),
        feature_bytes(kWarps * kTileFrames * kChannels * operand_bytes) {}
  // Windows, features and partial energies [warps as tiles][warps][16 frames].
  SLIGRU_HD int energies_bytes() const {
    return window_bytes + feature_bytes + kWarps * kWarps * kTileFrames * 4;
  }
  SLIGRU_HD int bytes() const {
    const int partials = SkinnyPartials<kGates>::kBytes;
    return filter_bytes + (partials > energies_bytes() ? partials : energies_bytes());
  }
};

#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS

constexpr int kGroupWarps = 4, kGroups = kWarps / kGroupWarps;  // of the summary

template <class T>
__device__ __forceinline__ void cell(const Forward& p, int token, float* shared) {
  const Shape& shape = p.shape;
  const int64_t H = shape.hidden, C = shape.context;
  T* hidden = static_cast<T*>(p.hidden_operand);
  const T* before = hidden + (token + 1) % 2 * shape.batch * H;
  T* after = hidden + token % 2 * shape.batch * H;
  for_products(shape.hidden, shape.batch, [&](int unit, int row, int rows) {
    const int index = threadIdx.x, j = unit + index % kSkinnyUnits, b = row + index / kSkinnyUnits;
    const bool mine = index < rows * kSkinnyUnits;
    float i_r = 0, i_z = 0, i_n = 0, g_r = 0, g_z = 0, g_n = 0, previous = 0;
    if (mine) {
      const float* wx = p.wx + (static_cast<int64_t>(b) * shape.tokens + token) * 3 * H + j;
      i_r = __ldg(wx);
      i_z = __ldg(wx + H);
      i_n = __ldg(wx + 2 * H);
      if (p.u_bias != nullptr) {
        g_r = __ldg(p.u_bias + j);
        g_z = __ldg(p.u_bias + H + j);
        g_n = __ldg(p.u_bias + 2 * H + j);
      }
      if (token > 0)
        previous = __ldcg(p.h + (static_cast<int64_t>(b) * shape.tokens + token - 1) * H + j);
    }
    SkinnySums sums[kGates] = {};  // r, z, n of the input, n of the state
    const T* masked = static_cast<const T*>(p.masked_operand) + row * C;
    skinny_product<0, 1, 2>(SkinnyOperand<T>{masked, C}, rows,
                            SkinnyOperand<T>{static_cast<const T*>(p.w_context) + unit * C, C},
                            H * C, shape.context, sums);
    skinny_product<0, 1, 3>(SkinnyOperand<T>{before + row * H, H}, rows,
                            SkinnyOperand<T>{static_cast<const T*>(p.u) + unit * H, H}, H * H,
                            shape.hidden, sums);
    const SkinnyPartials<kGates> partials{shared};
    for (int gate = 0; gate < kGates; ++gate) partials.put(gate, sums[gate]);
    __syncthreads();
    if (mine) {
      const float r = sigmoid(i_r + g_r + partials.sum(0, index));
      const float z = sigmoid(i_z + g_z + partials.sum(1, index));
      const float n =
          tanh_of<float>(i_n + partials.sum(2, index) + r * (g_n + partials.sum(3, index)));
      const float h = n + z * (previous - n);
      p.h[(static_cast<int64_t>(b) * shape.tokens + token) * H + j] = h;
      after[b * H + j] = narrow<T>(h);
    }
    __syncthreads();
  });
}

template <class T>
__device__ __forceinline__ void query(const Forward& p, int token, float* shared) {
  const Shape& shape = p.shape;
  const int64_t H = shape.hidden, A = shape.attention;
  const T* hidden = static_cast<const T*>(p.hidden_operand) + token % 2 * shape.batch * H;
  multiply_rows(SkinnyOperand<T>{hidden, H}, shape.batch, p.w_query, shape.attention, shape.hidden,
                shared, [&](int64_t b, int j, float sum) { p.query[b * A + j] = sum; });
}

template <class T>
__device__ __forceinline__ void energies(const Forward& p, int token, const float* filters,
                                         const Layout& layout, char* shared) {
  const Shape& shape = p.shape;
  const int64_t A = shape.attention;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int padded_taps = shape.padded_taps();
  float* window = reinterpret_cast<float*>(shared) + warp * window_floats(padded_taps);
  T* features = reinterpret_cast<T*>(shared + layout.window_bytes);
  float* partial = reinterpret_cast<float*>(shared + layout.window_bytes + layout.feature_bytes);

  const int64_t tiles = static_cast<int64_t>(shape.batch) * shape.tiles();
  const int begin = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  for (int first = begin; first < end; first += kWarps) {
    const int count = min(kWarps, end - first);
    if (warp < count) {
      const int row = (first + warp) / shape.tiles(), tile = (first + warp) % shape.tiles();
      load_window(shape, p.attention, row, token, tile, window);
      float f[2][4];
      convolve<T>(window, filters, padded_taps, f);
      store_features(f, kTileFrames, features + warp * kTileFrames * kChannels);
    }
    for (int i = lane; i < kWarps * kTileFrames; i += 32)
      partial[i / kTileFrames * (kWarps * kTileFrames) + warp * kTileFrames + i % kTileFrames] = 0;
    __syncthreads();
    for (int block = warp; block < shape.attention / kTileUnits; block += kWarps) {
      const int unit = block * kTileUnits, mine = unit + 8 * c;
      const LocationWeights<T> weights(static_cast<const T*>(p.w_location) + unit * kChannels);
      const Eight<float> v = Eight<float>::load(p.v + mine);
      // The keys of the next tile are on their way while this one's are used.
      auto key = [&](int i, int frame) {
        const int row = (first + i) / shape.tiles(), tile = (first + i) % shape.tiles();
        const int l = min(tile * kTileFrames + frame, shape.frames - 1);
        return Eight<T>::load(static_cast<const T*>(p.keys) +
                              (static_cast<int64_t>(row) * shape.frames + l) * A + mine);
      };
      auto query_of = [&](int i) {
        return Eight<float>::load_exchanged(p.query + (first + i) / shape.tiles() * A + mine);
      };
      Eight<T> next_g = key(0, g), next_g8 = key(0, g + 8);
      Eight<float> next_query = query_of(0);
      for (int i = 0; i < count; ++i) {
        const Eight<T> key_g = next_g, key_g8 = next_g8;
        const Eight<float> q = next_query;
        if (i + 1 < count) {
          next_g = key(i + 1, g);
          next_g8 = key(i + 1, g + 8);
          next_query = query_of(i + 1);
        }
        const LocationFeatures<T> f(features + i * kTileFrames * kChannels, kTileFrames - 1);
        float s[4][4];
        compute_scores(key_g, key_g8, q, f, weights, s);
        float low = 0, high = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 factor = v.pair(j);
          low += factor.x * tanh_of<T>(s[j][0]) + factor.y * tanh_of<T>(s[j][1]);
          high += factor.x * tanh_of<T>(s[j][2]) + factor.y * tanh_of<T>(s[j][3]);
        }
        low = sum_of_group(low);
        high = sum_of_group(high);
        if (c == 0) {
          float* to = partial + (i * kWarps + warp) * kTileFrames + g;
          to[0] += low;
          to[8] += high;
        }
      }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < count * kTileFrames; index += kThreads) {
      const int i = index / kTileFrames, row = (first + i) / shape.tiles();
      const int l = (first + i) % shape.tiles() * kTileFrames + index % kTileFrames;
      float e = 0;
      for (int w = 0; w < kWarps; ++w)
        e += partial[(i * kWarps + w) * kTileFrames + index % kTileFrames];
      if (l < shape.frames)
        p.energies[static_cast<int64_t>(row) * shape.frames + l] =
            (l < length_of(shape, row) ? e : -INFINITY) * shape.scaling;
    }
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ void summary(const Forward& p, int token, float* shared) {
  constexpr int kWide = kChunk<T>, kMine = kWide / 4;  // values of a group, of a lane
  const Shape& shape = p.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int group = warp / kGroupWarps, L = shape.frames, chunks = shape.value / kWide;
  const int items = shape.batch * chunks;
  for (int first = blockIdx.x * kGroups; first < items; first += gridDim.x * kGroups) {
    const int item = first + group, row = item / chunks, chunk = item % chunks;
    if (item < items) {
      const float* e = p.energies + static_cast<int64_t>(row) * L;
      float largest = -INFINITY;
      for (int l = lane; l < L; l += 32) {
        const float x = __ldcg(e + l);
        largest = x > largest || x != x ? x : largest;
      }
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(~0u, largest, offset);
        largest = other > largest || other != other ? other : largest;
      }
      float total = 0;
      for (int l = lane; l < L; l += 32) total += expf(__ldcg(e + l) - largest);
      for (int offset = 16; offset > 0; offset /= 2) total = add_lane_xor(total, offset);
      const float factor = 1.f / total;

      const T* values = static_cast<const T*>(p.values) +
                        static_cast<int64_t>(row) * L * shape.value + chunk * kWide + c * kMine;
      float* attention = p.attention + (static_cast<int64_t>(row) * shape.tokens + token) * L;
      float sums[kMine] = {};
#pragma unroll 4
      for (int l = warp % kGroupWarps * 8 + g; l < L; l += 8 * kGroupWarps) {
        const uint4 bits =
            __ldg(reinterpret_cast<const uint4*>(values + static_cast<int64_t>(l) * shape.value));
        const float weight = expf(__ldcg(e + l) - largest) * factor;
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (kIsFloat<T>) {
            sums[i] += weight * __uint_as_float(words[i]);
          } else {
            const float2 pair = unpack_pair<T>(words[i]);
            sums[2 * i] += weight * pair.x;
            sums[2 * i + 1] += weight * pair.y;
          }
        }
        if (chunk == 0 && c == 0) attention[l] = weight;
      }
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        sums[i] = sum_over_groups(sums[i]);
        if (g == 0) shared[warp * kWide + c * kMine + i] = sums[i];
      }
    }
    __syncthreads();
    const int mine = threadIdx.x / kWide;  // the group whose sum this thread collects
    if (mine < kGroups && first + mine < items) {
      const int column = threadIdx.x % kWide;
      float x = 0;
      for (int w = 0; w < kGroupWarps; ++w) x += shared[(mine * kGroupWarps + w) * kWide + column];
      static_cast<T*>(p.summary)[static_cast<int64_t>((first + mine) / chunks) * shape.value +
                                 (first + mine) % chunks * kWide + column] = narrow<T>(x);
    }
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ void context(const Forward& p, int token, float* shared) {
  const Shape& shape = p.shape;
  const int64_t V = shape.value, C = shape.context;
  multiply_rows(SkinnyOperand<T>{static_cast<const T*>(p.summary), V}, shape.batch, p.w_out,
                shape.context, shape.value, shared, [&](int64_t b, int j, float sum) {
                  const float c = sum + __ldg(p.b_out + j);
                  const int64_t at = (b * shape.tokens + token) * C + j;
                  p.context[at] = c;
                  if (token + 1 == shape.tokens) return;
                  const float mask =
                      p.context_mask == nullptr ? 1.f : __ldg(p.context_mask + at + C);
                  static_cast<T*>(p.masked_operand)[b * C + j] = narrow<T>(mask * c);
                });
}

#endif

template <class T>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const Forward p) {
#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS
  extern __shared__ __align__(16) char memory[];
  const Layout layout(p.shape, sizeof(T));
  float* filters = reinterpret_cast<float*>(memory);
  char* shared = memory + layout.filter_bytes;
  float* partials = reinterpret_cast<float*>(shared);
  const int taps = p.shape.padded_taps();
  for (int i = threadIdx.x; i < kChannels * taps; i += kThreads)
    filters[i / taps * filter_stride(taps) + i % taps] = __ldg(p.filters + i);
  GridBarrier barrier(p.arrivals);
  for (int token = 0; token < p.shape.tokens; ++token) {
    cell<T>(p, token, partials);
    barrier.wait();
    query<T>(p, token, partials);
    barrier.wait();
    energies<T>(p, token, filters, layout, shared);
    barrier.wait();
    summary<T>(p, token, partials);
    barrier.wait();
    context<T>(p, token, partials);
    barrier.wait();
  }
#endif
}

}  // namespace

cudaError_t run_forward(const Forward& p, cudaStream_t stream) {
  return with_operand(p.shape.operand_type, [&](auto operand) {
    using T = decltype(operand);
    return launch_on_all(forward_kernel<T>, kThreads, Layout(p.shape, sizeof(T)).bytes(), p,
                         stream);
  });
}

}  // namespace sb_fast_sligru::attention_decoder
