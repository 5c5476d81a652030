// The backward pass over all tokens, from the last to the first, in one launch, one block a
// multiprocessor; decoder.h has the equations.
//
// A token has five phases, after each of which all blocks meet:
//
//   carries  what di and dg of token t + 1 give: dc_t (8 units a block) and part of dh_t
//   summary  dx = W_o^T dc: 8 units
//   weights  dp = value . dx: 8 frames a warp
//   query    de, and dq = sum_l ds[l] of 64 units and one row a block, whose warps share the frames;
//            s is computed anew
//   cell     dh_t with W_q^T dq, then di and dg: 8 units
//
// Sums over tokens (gradients of weights, keys, values) are not formed here but after the loop, from
// what the phases leave in memory (sweep.h, sums.cu).
#include "attention_decoder/persistent/products.cuh"
#include "attention_decoder/persistent/window.cuh"
#include "common/cooperative_launch.cuh"
#include "common/grid_barrier.cuh"

namespace sb_fast_sligru::attention_decoder {
namespace {

constexpr int kWarps = kSkinnyWarps, kThreads = 32 * kWarps;
constexpr int kSharedBytes = SkinnyPartials<1>::kBytes;
static_assert(kSharedBytes >= kWarps * kTileUnits * static_cast<int>(sizeof(float)));

#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS

constexpr int kQueryTiles = 2;                     // of 32 units, of a block
constexpr int kFrameWarps = kWarps / kQueryTiles;  // that share the frames
constexpr int kQueryUnits = kQueryTiles * kTileUnits;

__device__ __forceinline__ int64_t at(const Shape& shape, int64_t row, int token, int64_t width) {
  return (row * shape.tokens + token) * width;
}

template <class T>
__device__ __forceinline__ void carries(const Backward& p, int token, float* shared) {
  const Shape& shape = p.shape;
  const int64_t H = shape.hidden, C = shape.context;
  const bool last = token + 1 == shape.tokens;
  auto put_context = [&](int64_t b, int j, float sum) {
    const int64_t index = at(shape, b, token, C) + j;
    float dc = p.grad_context == nullptr ? 0.f : __ldg(p.grad_context + index);
    if (!last) dc += (p.context_mask == nullptr ? 1.f : __ldg(p.context_mask + index + C)) * sum;
    static_cast<T*>(p.dc)[index] = narrow<T>(dc);
  };
  if (last) {  // there is no product; hidden_carry and direct are zero
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < shape.batch * C;
         i += int64_t{gridDim.x} * kThreads)
      put_context(i / C, static_cast<int>(i % C), 0.f);
    return;
  }
  const T* di = static_cast<const T*>(p.di) + at(shape, 0, token + 1, 3 * H);
  const T* dg = static_cast<const T*>(p.dg) + at(shape, 0, token + 1, 3 * H);
  const int64_t stride = shape.tokens * 3 * H;
  multiply_rows(SkinnyOperand<T>{di, stride}, shape.batch, p.w_context_t, shape.context,
                3 * shape.hidden, shared, put_context);
  multiply_rows(SkinnyOperand<T>{dg, stride}, shape.batch, p.u_t, shape.hidden, 3 * shape.hidden,
                shared, [&](int64_t b, int j, float sum) { p.hidden_carry[b * H + j] = sum; });
}

template <class T>
__device__ __forceinline__ void summary(const Backward& p, int token, float* shared) {
  const Shape& shape = p.shape;
  const int64_t C = shape.context, V = shape.value;
  const T* dc = static_cast<const T*>(p.dc) + at(shape, 0, token, C);
  multiply_rows(SkinnyOperand<T>{dc, shape.tokens * C}, shape.batch, p.w_out_t, shape.value,
                shape.context, shared, [&](int64_t b, int j, float sum) {
                  static_cast<T*>(p.dx)[at(shape, b, token, V) + j] = narrow<T>(sum);
                });
}

template <class T>
__device__ __forceinline__ float dot(const uint4& x, const uint4& y) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIsFloat<T>) {
      sum += __uint_as_float(a[i]) * __uint_as_float(b[i]);
    } else {
      const float2 u = unpack_pair<T>(a[i]), v = unpack_pair<T>(b[i]);
      sum += u.x * v.x + u.y * v.y;
    }
  }
  return sum;
}

template <class T>
__device__ __forceinline__ void weights(const Backward& p, int token) {
  constexpr int kFrames = 8;  // of a warp
  const Shape& shape = p.shape;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int L = shape.frames, groups = static_cast<int>(ceil_div(L, kFrames));
  const int items = shape.batch * groups;
  for (int item = blockIdx.x * kWarps + threadIdx.x / 32; item < items;
       item += gridDim.x * kWarps) {
    const int64_t row = item / groups;
    const int l = item % groups * kFrames + g;
    const T* dx = static_cast<const T*>(p.dx) + at(shape, row, token, shape.value);
    const T* value =
        static_cast<const T*>(p.values) + (row * L + min(l, L - 1)) * int64_t{shape.value};
    float sum = 0;
#pragma unroll 4
    for (int j = c * (kChunk<T> / 4); j < shape.value; j += kChunk<T>) {
      sum += dot<T>(__ldg(reinterpret_cast<const uint4*>(value + j)),
                    __ldcg(reinterpret_cast<const uint4*>(dx + j)));
    }
    sum = sum_of_group(sum);
    if (c == 0 && l < L) {
      if (p.grad_attention != nullptr)
        sum += __ldg(p.grad_attention + at(shape, row, token, L) + l);
      p.dp[row * L + l] = sum;
    }
  }
}

template <class T>
__device__ __forceinline__ void query(const Backward& p, int token, float* shared) {
  const Shape& shape = p.shape;
  const int64_t A = shape.attention;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int L = shape.frames;
  const int blocks = static_cast<int>(ceil_div(A, kQueryUnits)), items = shape.batch * blocks;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / blocks;
    const int unit = item % blocks * kQueryUnits + warp / kFrameWarps * kTileUnits;
    const float* attention = p.attention + at(shape, row, token, L);
    const float* dp = p.dp + row * L;
    float sum = 0;
    for (int l = lane; l < L; l += 32) sum += __ldg(attention + l) * __ldcg(dp + l);
    for (int offset = 16; offset > 0; offset /= 2) sum = add_lane_xor(sum, offset);
    auto de_of = [&](int l) {
      return l < L ? shape.scaling * __ldg(attention + l) * (__ldcg(dp + l) - sum) : 0.f;
    };
    if (item % blocks == 0) {
      for (int l = threadIdx.x; l < L; l += kThreads) p.de[at(shape, row, token, L) + l] = de_of(l);
    }
    float dq[4][2] = {};
    if (unit < A) {
      const int mine = unit + 8 * c;
      const LocationWeights<T> location(static_cast<const T*>(p.w_location) + unit * kChannels);
      const Eight<float> q = Eight<float>::load(p.query + at(shape, row, token, A) + mine);
      const T* keys = static_cast<const T*>(p.keys) + row * L * A + mine;
      const T* features =
          static_cast<const T*>(p.features) + at(shape, row, token, L) * int64_t{kChannels};
      const int tiles = shape.tiles();
      // The next tile is on its way while this one is used.
      auto key = [&](int tile, int frame) {
        return Eight<T>::load(keys + min(tile * kTileFrames + frame, L - 1) * A);
      };
      const int first = warp % kFrameWarps;
      Eight<T> next_g = key(first, g), next_g8 = key(first, g + 8);
      for (int tile = first; tile < tiles; tile += kFrameWarps) {
        const Eight<T> key_g = next_g, key_g8 = next_g8;
        if (tile + kFrameWarps < tiles) {
          next_g = key(tile + kFrameWarps, g);
          next_g8 = key(tile + kFrameWarps, g + 8);
        }
        const int frame = tile * kTileFrames;
        const LocationFeatures<T> f(features + frame * kChannels, L - 1 - frame);
        const float low = de_of(frame + g), high = de_of(frame + g + 8);
        float s[4][4];
        compute_scores(key_g, key_g8, q, f, location, s);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          dq[j][0] += low * tanh_parts<T>(s[j][0]).slope + high * tanh_parts<T>(s[j][2]).slope;
          dq[j][1] += low * tanh_parts<T>(s[j][1]).slope + high * tanh_parts<T>(s[j][3]).slope;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = sum_over_groups(dq[j][i]);
        if (g == 0) shared[warp * kTileUnits + 8 * c + 2 * j + i] = x;
      }
    }
    __syncthreads();
    const int j = item % blocks * kQueryUnits + threadIdx.x;
    if (threadIdx.x < kQueryUnits && j < A) {
      const int tile = threadIdx.x / kTileUnits;
      float x = 0;
      for (int w = 0; w < kFrameWarps; ++w)
        x += shared[(tile * kFrameWarps + w) * kTileUnits + threadIdx.x % kTileUnits];
      static_cast<T*>(p.dq)[at(shape, row, token, A) + j] = narrow<T>(x * __ldg(p.v + j));
    }
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ void cell(const Backward& p, int token, float* shared) {
  const Shape& shape = p.shape;
  const int64_t H = shape.hidden, A = shape.attention;
  const T* dq = static_cast<const T*>(p.dq) + at(shape, 0, token, A);
  multiply_rows(SkinnyOperand<T>{dq, shape.tokens * A}, shape.batch, p.w_query_t, shape.hidden,
                shape.attention, shared, [&](int64_t b, int j, float sum) {
                  const int64_t gates = at(shape, b, token, 3 * H) + j;
                  const int64_t state = at(shape, b, token, H) + j;
                  auto bias = [&](int64_t gate) {
                    return p.u_bias == nullptr ? 0.f : __ldg(p.u_bias + gate * H + j);
                  };
                  auto input = [&](int64_t gate) {
                    return __ldg(p.wx + gates + gate * H) + __ldg(p.input + gates + gate * H);
                  };
                  auto recurrent = [&](int64_t gate) {
                    return __ldg(p.recurrent + gates + gate * H) + bias(gate);
                  };
                  const float g_n = recurrent(2);
                  const float r = sigmoid(input(0) + recurrent(0));
                  const float z = sigmoid(input(1) + recurrent(1));
                  const Tanh n = tanh_parts<float>(input(2) + r * g_n);
                  const float previous = token > 0 ? __ldg(p.h + state - H) : 0.f;
                  float dh =
                      sum + __ldcg(p.hidden_carry + b * H + j) + __ldcg(p.direct + b * H + j);
                  if (p.grad_h != nullptr) dh += __ldg(p.grad_h + state);
                  const float dz = dh * (previous - n.value) * z * (1.f - z);
                  const float dn = dh * (1.f - z) * n.slope;
                  const float dr = dn * g_n * r * (1.f - r);
                  p.direct[b * H + j] = dh * z;
                  T* di = static_cast<T*>(p.di) + gates;
                  T* dg = static_cast<T*>(p.dg) + gates;
                  di[0] = dg[0] = narrow<T>(dr);
                  di[H] = dg[H] = narrow<T>(dz);
                  di[2 * H] = narrow<T>(dn);
                  dg[2 * H] = narrow<T>(dn * r);
                });
}

#endif

template <class T>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const Backward p) {
#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS
  extern __shared__ __align__(16) float shared[];
  GridBarrier barrier(p.arrivals);
  for (int token = p.shape.tokens - 1; token >= 0; --token) {
    carries<T>(p, token, shared);
    barrier.wait();
    summary<T>(p, token, shared);
    barrier.wait();
    weights<T>(p, token);
    barrier.wait();
    query<T>(p, token, shared);
    barrier.wait();
    cell<T>(p, token, shared);
    barrier.wait();
  }
#endif
}

}  // namespace

cudaError_t run_backward(const Backward& p, cudaStream_t stream) {
  return with_operand(p.shape.operand_type, [&](auto operand) {
    return launch_on_all(backward_kernel<decltype(operand)>, kThreads, kSharedBytes, p, stream);
  });
}

}  // namespace sb_fast_sligru::attention_decoder
