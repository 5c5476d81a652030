// Device code that the persistent kernels share: operand types, tensor-core product, asynchronous
// copies, gate algebra, and the geometry of a cluster.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "exchange.cuh"
#include "persistent.h"

// Clusters and st.async exist from compute capability 9.0 on; for older targets the kernels are
// empty and persistent_plan() refuses the device.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SB_FAST_SLIGRU_HAS_CLUSTERS 1
#else
#define SB_FAST_SLIGRU_HAS_CLUSTERS 0
#endif

namespace sb_fast_sligru {

// A block owns 32 units, 8 a warp; a cluster serves 4 rows. The 8 columns of an m16n8k16 product
// hold every row twice (column n is row n / 2), so that every lane of the accumulator owns one
// valid value. Why 4 rows: the exchange, bound by bytes and messages into a block, is most of a
// step. In 16-bit types there are blocks of two such parts, 64 units, too: see launch_forward().
constexpr int kRows = 4;
constexpr int kWarps = 4;
constexpr int kBlockUnits = 8 * kWarps;
template <int kUnits>
constexpr int kThreads = 32 * (kUnits / 8);  // of a block of so many units
constexpr int kRingSteps = 4;                // time steps of input in flight

// Ka, Kz, 1 - z and, with the norm, q and V: what the backward recurrence reads a unit and step.
template <bool kLayerNorm>
constexpr int kCoefficientStreams = kLayerNorm ? 5 : 3;

template <class T>
struct OperandTraits;

template <>
struct OperandTraits<__nv_bfloat16> {
  static constexpr DType kType = DType::kBFloat16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

template <>
struct OperandTraits<__half> {
  static constexpr DType kType = DType::kFloat16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
};

template <class T>
__device__ __forceinline__ uint16_t to_bits(float x) {
  return static_cast<uint16_t>(OperandTraits<T>::pack(x, 0.f));
}

// d += a b, m16n8k16. Lane 4g + c holds a = {(g, 2c..), (g + 8, 2c..), (g, 2c + 8..), (g + 8, 2c
// + 8..)}, b = {(2c.., g), (2c + 8.., g)}, d = {(g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c +
// 1)}.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (OperandTraits<T>::kType == DType::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Transpose of an 8x8 matrix of 16-bit values spread over a warp as a product's accumulator is.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float add_lane_xor(float x, int offset) {
  return x + __shfl_xor_sync(0xffffffffu, x, offset);
}

// Keeps a loop-invariant value in its register: the compiler would rather compute some of them anew
// in every time step, from special registers or parameters, at up to 50 cycles each. A shuffle with
// itself is opaque to it. To be called by whole warps.
__device__ __forceinline__ void pin(uint32_t& x) {
  x = __shfl_sync(0xffffffffu, x, static_cast<int>(threadIdx.x) % 32);
}
__device__ __forceinline__ void pin(float& x) {
  x = __shfl_sync(0xffffffffu, x, static_cast<int>(threadIdx.x) % 32);
}
__device__ __forceinline__ void pin(int64_t& x) {
  x = __shfl_sync(0xffffffffu, static_cast<long long>(x), static_cast<int>(threadIdx.x) % 32);
}

// bar.sync of the `threads` threads that use barrier `id` (0 is __syncthreads).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- shared memory, by 32-bit address ----
__device__ __forceinline__ float load_float(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

template <class T>
__device__ __forceinline__ float load_operand(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return OperandTraits<T>::to_float(x);
}

__device__ __forceinline__ uint2 load_uint2(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float2 load_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float4 load_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void load_uint4_if(uint4& x, uint32_t address, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %5, 0;\n"
      "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
      : "r"(address), "r"(static_cast<int>(condition))
      : "memory");
}

__device__ __forceinline__ void store_float(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ __forceinline__ void store_bits(uint32_t address, uint16_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}

// ---- global to shared memory, in groups ----
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- gates ----
__device__ __forceinline__ float reciprocal_sqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 2^-22
  return y;
}

__device__ __forceinline__ float exponential(float x) {  // 2^-21
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exponential(-x)); }

// Absolute error 2^-22, without a branch.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  return fmaf(-2.f, reciprocal(1.f + exponential(2.f * x)), 1.f);
}

// sin(x) and cos(x) to 2^-23 absolute: the sine of what x is beyond a multiple (cosine: an odd
// multiple of a half) of pi, by a polynomial on [-pi/2, pi/2]. The hardware's sine has 2^-21; sinf
// would need a table in local memory for its largest arguments.
__device__ __forceinline__ float sine_beyond(float x, float half_turns, bool negative) {
  const float y = fmaf(half_turns, 8.74227766e-8f, fmaf(half_turns, -3.14159274f, x));
  const float y2 = y * y;
  float p = fmaf(2.60005459e-6f, y2, -1.98066147e-4f);
  p = fmaf(p, y2, 8.33301712e-3f);
  p = fmaf(p, y2, -0.166666567f);
  const float sine = fmaf(p * y2, y, y);
  return negative ? -sine : sine;
}

__device__ __forceinline__ float sine(float x) {
  const float half_turns = rintf(x * 0.318309886f);
  return sine_beyond(x, half_turns, static_cast<int>(half_turns) & 1);
}

__device__ __forceinline__ float cosine(float x) {
  const float half_turns = rintf(fmaf(x, 0.318309886f, -0.5f));
  return sine_beyond(x, half_turns + 0.5f, (static_cast<int>(half_turns) & 1) == 0);
}

// activate() and activation_gradient() of cell.h without the standard library's slow paths.
__device__ __forceinline__ float fast_activate(Activation activation, float a) {
  if (activation == Activation::kRelu) return activate(Activation::kRelu, a);  // tested first
  if (activation == Activation::kLeakyRelu) return activate(Activation::kLeakyRelu, a);
  return activation == Activation::kTanh ? hyperbolic_tangent(a) : sine(a);
}

__device__ __forceinline__ float fast_activation_gradient(Activation activation, float a) {
  if (activation == Activation::kTanh) {
    const float value = hyperbolic_tangent(a);
    return fmaf(-value, value, 1.f);
  }
  if (activation == Activation::kSin) return cosine(a);
  return activation_gradient(activation, a);
}

// ---- geometry ----
struct Row {
  int index;      // row of the state, h0, drop_mask, rho
  int batch;      // batch entry
  int direction;  // 0 forward, 1 backward in time
  bool valid;     // false: repeats the last row, its results are not stored
};

__device__ __forceinline__ Row locate_row(const Recurrence& layer, int index) {
  Row row;
  const int rows = static_cast<int>(layer.rows()), batch = static_cast<int>(layer.batch);
  row.valid = index < rows;
  row.index = row.valid ? index : rows - 1;
  row.direction = row.index >= batch;
  row.batch = row.index - row.direction * batch;
  return row;
}

// [B, T, n] with unit stride along n.
struct Sequence {
  const void* data;
  DType type;  // float or the operand type
  int64_t batch_stride, time_stride;

  __device__ __forceinline__ bool is_float() const { return type == DType::kFloat32; }
  __device__ __forceinline__ int bytes() const { return is_float() ? 4 : 2; }
  // Address of [row, true time of step n, unit].
  __device__ __forceinline__ const char* at(const Recurrence& layer, const Row& row, int64_t n,
                                            int unit) const {
    const int64_t element =
        row.batch * batch_stride + layer.time_of(row.index, n) * time_stride + unit;
    return static_cast<const char*>(data) + element * bytes();
  }
  // Bytes from the element of step n to that of step n + 1.
  __device__ __forceinline__ int64_t step_bytes(const Row& row) const {
    return (row.direction ? -time_stride : time_stride) * bytes();
  }
};

__device__ __forceinline__ Sequence wx_sequence(const Recurrence& layer) {
  return {layer.wx, layer.wx_type, layer.wx_batch_stride, layer.wx_time_stride};
}

__device__ __forceinline__ Sequence contiguous_sequence(const Recurrence& layer, const void* data,
                                                        DType type, int64_t size) {
  return {data, type, layer.time * size, size};
}

__device__ __forceinline__ Sequence h_sequence(const Recurrence& layer, const void* h) {
  return contiguous_sequence(layer, h, layer.output_type, layer.directions * layer.hidden);
}

}  // namespace sb_fast_sligru
