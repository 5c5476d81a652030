// The update on CUDA GPUs; adadelta.h has the mathematics.
//
// Layout: a block has a chunk of kChunk numbers of one tensor, four in a row a thread where all four
// tensors lie on 16 bytes. A launch has as many tensors as its parameters have room for; a block looks
// its own up there, so that no list of them has to reach the GPU first.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "adadelta/adadelta.h"

namespace sb_fast_sligru::adadelta::cuda {
namespace {

constexpr int kThreads = 256, kVector = 4;
constexpr int64_t kChunk = int64_t{kThreads} * kVector * 4;
constexpr int kMostTensors = 90;  // of a launch

struct Launch {
  Rule rule;
  int count;
  unsigned end[kMostTensors];  // of a tensor's chunks, counted over all tensors
  Parameters tensors[kMostTensors];
};
static_assert(sizeof(Launch) <= 4096, "all GPUs take so many bytes of parameters");

__device__ __forceinline__ float4 load(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}

__device__ __forceinline__ void store(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Launch p) {
  int low = 0, high = p.count - 1;  // the first tensor that ends after this chunk
  while (low < high) {
    const int middle = (low + high) / 2;
    if (blockIdx.x < p.end[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const Parameters& mine = p.tensors[low];
  const int64_t begin = (blockIdx.x - (low == 0 ? 0u : p.end[low - 1])) * kChunk;
  const int count = static_cast<int>(min(kChunk, mine.size - begin));
  float *x = mine.x + begin, *square_avg = mine.square_avg + begin,
        *acc_delta = mine.acc_delta + begin;
  const float* grad = mine.grad + begin;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(grad) |
                              reinterpret_cast<uintptr_t>(square_avg) |
                              reinterpret_cast<uintptr_t>(acc_delta);
  const int vectors = addresses % sizeof(float4) == 0 ? count / kVector : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const int at = i * kVector;
    float4 x4 = load(x + at), v4 = load(square_avg + at), u4 = load(acc_delta + at);
    const float4 g4 = load(grad + at);
    p.rule.update(x4.x, g4.x, v4.x, u4.x);
    p.rule.update(x4.y, g4.y, v4.y, u4.y);
    p.rule.update(x4.z, g4.z, v4.z, u4.z);
    p.rule.update(x4.w, g4.w, v4.w, u4.w);
    store(x + at, x4);
    store(square_avg + at, v4);
    store(acc_delta + at, u4);
  }
  for (int i = vectors * kVector + threadIdx.x; i < count; i += kThreads)
    p.rule.update(x[i], grad[i], square_avg[i], acc_delta[i]);
}

}  // namespace

void update(const Rule& rule, const std::vector<Parameters>& tensors, void* stream) {
  for (size_t first = 0; first < tensors.size(); first += kMostTensors) {
    Launch launch = {rule};
    launch.count = static_cast<int>(std::min<size_t>(kMostTensors, tensors.size() - first));
    unsigned chunks = 0;
    for (int i = 0; i < launch.count; i++) {
      launch.tensors[i] = tensors[first + i];
      launch.end[i] = chunks += static_cast<unsigned>(ceil_div(launch.tensors[i].size, kChunk));
    }
    update_kernel<<<chunks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
      throw std::runtime_error("sb_fast_sligru: a kernel did not launch: " +
                               std::string(cudaGetErrorString(error)));
  }
}

}  // namespace sb_fast_sligru::adadelta::cuda
