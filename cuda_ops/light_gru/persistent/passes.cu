// The elementwise passes around the sequential backward kernel: everything that does not depend on
// the order of time steps. The algebra is at the head of backward_narrow.cu. Every thread handles 8
// neighbouring units.
#include "light_gru/persistent/geometry.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kVector = 8;
constexpr int kPassThreads = 256;
constexpr int kSegment = 8;  // steps that one block of finish_kernel handles

__device__ __forceinline__ void load(const float* from, float (&x)[kVector]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

template <class T>
__device__ __forceinline__ void load(const T* from, float (&x)[kVector]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = OperandTraits<T>::to_float(static_cast<uint16_t>(words[i]));
    x[2 * i + 1] = OperandTraits<T>::to_float(static_cast<uint16_t>(words[i] >> 16));
  }
}

__device__ __forceinline__ void store(float* to, const float (&x)[kVector]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

template <class T>
__device__ __forceinline__ void store(T* to, const float (&x)[kVector]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(OperandTraits<T>::pack(x[0], x[1]), OperandTraits<T>::pack(x[2], x[3]),
                 OperandTraits<T>::pack(x[4], x[5]), OperandTraits<T>::pack(x[6], x[7]));
}

// 8 elements of a sequence of float or T.
template <class T>
__device__ __forceinline__ void load(DType type, const char* from, float (&x)[kVector]) {
  if (type == DType::kFloat32)
    load(reinterpret_cast<const float*>(from), x);
  else
    load(reinterpret_cast<const T*>(from), x);
}

template <class T>
__device__ __forceinline__ void store(DType type, char* to, const float (&x)[kVector]) {
  if (type == DType::kFloat32)
    store(reinterpret_cast<float*>(to), x);
  else
    store(reinterpret_cast<T*>(to), x);
}

// Parameters of 8 units; `fallback` where there are none.
__device__ __forceinline__ void load_or(const void* from, int64_t offset, float fallback,
                                        float (&x)[kVector]) {
  if (from != nullptr) {
    load(static_cast<const float*>(from) + offset, x);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i++) x[i] = fallback;
  }
}

__host__ __device__ inline int64_t row_steps(const PersistentBackward& p) {
  return p.layer.rows() * p.count;
}

// h_previous[row, n] = h[row, n - 1], or h0, in the operand type; zeros beyond a sequence's end.
template <class T>
__global__ void __launch_bounds__(kPassThreads)
    gather_kernel(const __grid_constant__ PersistentBackward p) {
  const Recurrence& layer = p.layer;
  const int hidden = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const int vectors = hidden / kVector;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPassThreads + threadIdx.x;
  const int64_t row_step = i / vectors;
  if (row_step >= row_steps(p)) return;
  const int unit = static_cast<int>(i % vectors) * kVector;
  const Row row = row_of_layer(layer, static_cast<int>(row_step / count));
  const int64_t n = p.first + static_cast<int>(row_step % count);
  float h[kVector] = {};
  if (n > 0 && n < row.length)
    load<T>(layer.output_type,
            h_sequence(layer, p.h).at(layer, row, n - 1, row.direction * hidden + unit), h);
  else if (n == 0)
    load_or(layer.h0, int64_t{row.index} * hidden + unit, 0.f, h);
  store(static_cast<T*>(p.h_previous) + i * kVector, h);
}

// Coefficients of the linear recurrence; zero where a unit or step is padding.
template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kPassThreads)
    prepare_kernel(const __grid_constant__ PersistentBackward p, int padded) {
  const Recurrence& layer = p.layer;
  const int hidden = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const int vectors = padded / kVector;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPassThreads + threadIdx.x;
  const int64_t row_step = i / vectors;
  if (row_step >= row_steps(p)) return;
  const int unit = static_cast<int>(i % vectors) * kVector;
  constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  float out[kStreams][kVector] = {};
  const Row row = row_of_layer(layer, static_cast<int>(row_step / count));
  const int64_t n = p.first + static_cast<int>(row_step % count);
  if (unit < hidden && n < row.length) {
    const float* projection = p.projection + row_step * (kLayerNorm ? 3 : 2) * hidden + unit;
    float wx_a[kVector], wx_z[kVector], r_a[kVector], r_z[kVector], mask[kVector], h[kVector];
    float gamma_a[kVector], gamma_z[kVector], beta_a[kVector], beta_z[kVector], v[kVector];
    load<T>(layer.wx_type, wx_sequence(layer).at(layer, row, n, unit), wx_a);
    load<T>(layer.wx_type, wx_sequence(layer).at(layer, row, n, hidden + unit), wx_z);
    load(projection, r_a);
    load(projection + hidden, r_z);
    load_or(layer.drop_mask, int64_t{row.index} * hidden + unit, 1.f, mask);
    load(static_cast<const T*>(p.h_previous) + row_step * hidden + unit, h);
    float rho = 1.f;
    if constexpr (kLayerNorm) {
      load(projection + 2 * hidden, v);
      load_or(layer.ln_weight, unit, 1.f, gamma_a);
      load_or(layer.ln_weight, hidden + unit, 1.f, gamma_z);
      load_or(layer.ln_bias, unit, 0.f, beta_a);
      load_or(layer.ln_bias, hidden + unit, 0.f, beta_z);
      rho = p.rho[row.index * layer.time + row.time_of(n)];
    }
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      float y_a = r_a[j], y_z = r_z[j];
      if constexpr (kLayerNorm) {
        y_a *= gamma_a[j] * rho;
        y_z *= gamma_z[j] * rho;
        wx_a[j] += beta_a[j];
        wx_z[j] += beta_z[j];
      }
      const float a = wx_a[j] + y_a;
      // Both from the exponential: 1 - z computed from a rounded z would lose a slow gate's time
      // constant.
      const float complement = fast_sigmoid(-(wx_z[j] + y_z)), z = fast_sigmoid(wx_z[j] + y_z);
      const float value = fast_activate(layer.activation, a);
      const float k_a = complement * mask[j] * fast_activation_gradient(layer.activation, a);
      const float k_z = (h[j] - value * mask[j]) * z * complement;
      out[0][j] = k_a;
      out[1][j] = k_z;
      out[2][j] = complement;
      if constexpr (kLayerNorm) {
        out[3][j] = fmaf(k_a, y_a, k_z * y_z);
        out[4][j] = rho * v[j];
      }
    }
  }
  T* to = static_cast<T*>(p.coefficients) + row_step * kStreams * padded + unit;
#pragma unroll
  for (int s = 0; s < kStreams; s++) store(to + s * padded, out[s]);
}

// Gradients of wx; operands dr = gamma dwx - m2 xh and rho h_previous of the product that gives du
// (rho goes with h, since rho dx overflows float16 where the rows of Uc h are small and rho is
// large); sums over the segment for the gradients of the affine part. Block: one row and segment of
// one direction; a thread: 8 of the 2H columns.
template <class T, bool kLayerNorm>
__global__ void finish_kernel(const __grid_constant__ PersistentBackward p, int padded,
                              int direction) {
  const Recurrence& layer = p.layer;
  const int hidden = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const int segments = (count + kSegment - 1) / kSegment;
  const Row row = row_of_layer(
      layer, direction * static_cast<int>(layer.batch) + static_cast<int>(blockIdx.x) / segments);
  const int segment = static_cast<int>(blockIdx.x) % segments;
  const int column = static_cast<int>(threadIdx.x) * kVector;
  if (column >= 2 * hidden) return;
  const bool gate = column >= hidden;
  const int end = min(count, (segment + 1) * kSegment);
  float gamma[kVector], weight_sum[kVector] = {}, bias_sum[kVector] = {};
  load_or(layer.ln_weight, column, 1.f, gamma);
  for (int k = segment * kSegment; k < end; k++) {
    const int64_t row_step = int64_t{row.index} * count + k;
    const int64_t n = p.first + k;
    T* dr_row = static_cast<T*>(p.dr) + row_step * 2 * hidden + column;
    float dwx[kVector] = {}, x[kVector];
    if (n >= row.length) {
      store(dr_row, dwx);
      continue;
    }
    load(static_cast<const T*>(p.dwx_rows) + (row_step * 2 + gate) * padded + column -
             (gate ? hidden : 0),
         dwx);
    if constexpr (kLayerNorm) {
      float r[kVector], dr[kVector];
      load(p.projection + row_step * 3 * hidden + column, r);
      const float rho = p.rho[row.index * layer.time + row.time_of(n)];
      const float m2 = p.m2[row_step];
#pragma unroll
      for (int j = 0; j < kVector; j++) {
        const float xh = r[j] * rho;
        dr[j] = fmaf(gamma[j], dwx[j], -m2 * xh);
        weight_sum[j] = fmaf(dwx[j], xh, weight_sum[j]);
        bias_sum[j] += dwx[j];
      }
      store(dr_row, dr);
      if (!gate) {
        T* previous = static_cast<T*>(p.h_previous) + row_step * hidden + column;
        load(static_cast<const T*>(previous), x);
#pragma unroll
        for (int j = 0; j < kVector; j++) x[j] *= rho;
        store(previous, x);
      }
    } else {
      store(dr_row, dwx);
    }
    // The other direction wrote this time step in a chunk processed earlier, or (direction 1,
    // launched second) in this one.
    const bool add =
        layer.directions == 2 &&
        (direction == 0 ? row.length - 1 - n >= p.first + count : row.length - 1 - n >= p.first);
    const Sequence dwx_sequence =
        contiguous_sequence(layer, p.dwx, layer.wx_type, 2 * layer.hidden);
    char* to = const_cast<char*>(dwx_sequence.at(layer, row, n, column));
    if (add) {
      load<T>(layer.wx_type, to, x);
#pragma unroll
      for (int j = 0; j < kVector; j++) dwx[j] += x[j];
    }
    store<T>(layer.wx_type, to, dwx);
  }
  if (kLayerNorm && p.affine_partial != nullptr) {
    float* partial =
        p.affine_partial + (int64_t{row.index} * segments + segment) * 4 * hidden + column;
    store(partial, weight_sum);
    store(partial + 2 * hidden, bias_sum);
  }
}

template <class T>
cudaError_t gather(const PersistentBackward& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(row_steps(p) * (p.layer.hidden / kVector), kPassThreads);
  gather_kernel<T><<<static_cast<unsigned>(blocks), kPassThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t prepare(const PersistentBackward& p, cudaStream_t stream) {
  const int padded = p.choice.padded_hidden();
  const auto blocks =
      static_cast<unsigned>(ceil_div(row_steps(p) * (padded / kVector), kPassThreads));
  if (p.layer.layer_norm)
    prepare_kernel<T, true><<<blocks, kPassThreads, 0, stream>>>(p, padded);
  else
    prepare_kernel<T, false><<<blocks, kPassThreads, 0, stream>>>(p, padded);
  return cudaGetLastError();
}

template <class T>
cudaError_t finish(const PersistentBackward& p, cudaStream_t stream) {
  const int padded = p.choice.padded_hidden();
  const auto blocks = static_cast<unsigned>(p.layer.batch * ceil_div(p.count, kSegment));
  const auto threads = static_cast<unsigned>(ceil_div(2 * p.layer.hidden / kVector, 32) * 32);
  for (int direction = 0; direction < p.layer.directions; direction++) {
    if (p.layer.layer_norm)
      finish_kernel<T, true><<<blocks, threads, 0, stream>>>(p, padded, direction);
    else
      finish_kernel<T, false><<<blocks, threads, 0, stream>>>(p, padded, direction);
  }
  return cudaGetLastError();
}

}  // namespace

int coefficient_streams(bool layer_norm) {
  return layer_norm ? kCoefficientStreams<true> : kCoefficientStreams<false>;
}

int64_t affine_partials(int64_t rows, int64_t count) { return rows * ceil_div(count, kSegment); }

cudaError_t gather_h_previous(const PersistentBackward& p, cudaStream_t stream) {
  return with_operand_type(p.layer, [&](auto t) { return gather<decltype(t)>(p, stream); });
}

cudaError_t prepare_backward(const PersistentBackward& p, cudaStream_t stream) {
  return with_operand_type(p.layer, [&](auto t) { return prepare<decltype(t)>(p, stream); });
}

cudaError_t finish_backward(const PersistentBackward& p, cudaStream_t stream) {
  return with_operand_type(p.layer, [&](auto t) { return finish<decltype(t)>(p, stream); });
}

}  // namespace sb_fast_sligru
