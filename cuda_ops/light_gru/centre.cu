// A matrix less its column mean, computed in the accumulation type, then rounded, in one launch: U
// as the recurrent products read it, and the gradient of U. As torch's operations it would cost
// four launches, each as long for the host as many time steps of the persistent kernel.
//
// Layout: a block owns kColumns neighbouring columns (a sector of memory, so that there is a block
// for every multiprocessor); its row groups' partial sums are added in a fixed order.
#include <cuda_runtime.h>

#include "common/convert.cuh"
#include "light_gru/centre.h"

namespace sb_fast_sligru {
namespace {

constexpr int kColumns = 8;
constexpr int kRowGroups = 128;

template <class In, class Out, class Acc>
__global__ void __launch_bounds__(kColumns* kRowGroups)
    centre_kernel(const In* __restrict__ matrix, Out* __restrict__ out, int64_t hidden) {
  __shared__ Acc partial[kRowGroups][kColumns + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  Acc sum = 0;
  if (column < hidden) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < 2 * hidden; row += kRowGroups) {
      sum += widen(matrix[row * hidden + column]);
    }
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (column >= hidden) return;
  Acc mean = 0;
  for (int group = 0; group < kRowGroups; ++group) mean += partial[group][threadIdx.x];
  mean /= Acc(2 * hidden);
#pragma unroll 4
  for (int64_t row = threadIdx.y; row < 2 * hidden; row += kRowGroups) {
    out[row * hidden + column] = narrow<Out>(widen(matrix[row * hidden + column]) - mean);
  }
}

template <class In, class Out, class Acc>
cudaError_t launch(const void* matrix, void* out, int64_t hidden, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((hidden + kColumns - 1) / kColumns);
  centre_kernel<In, Out, Acc><<<blocks, dim3(kColumns, kRowGroups), 0, stream>>>(
      static_cast<const In*>(matrix), static_cast<Out*>(out), hidden);
  return cudaGetLastError();
}

}  // namespace

cudaError_t centre_columns(const void* matrix, DType matrix_type, void* out, DType out_type,
                           int64_t hidden, cudaStream_t stream) {
  switch (out_type) {
    case DType::kFloat64:
      return launch<double, double, double>(matrix, out, hidden, stream);
    case DType::kFloat32:
      return launch<float, float, float>(matrix, out, hidden, stream);
    case DType::kBFloat16:
      return matrix_type == DType::kFloat32
                 ? launch<float, __nv_bfloat16, float>(matrix, out, hidden, stream)
                 : launch<__nv_bfloat16, __nv_bfloat16, float>(matrix, out, hidden, stream);
    default:
      return matrix_type == DType::kFloat32
                 ? launch<float, __half, float>(matrix, out, hidden, stream)
                 : launch<__half, __half, float>(matrix, out, hidden, stream);
  }
}

}  // namespace sb_fast_sligru
