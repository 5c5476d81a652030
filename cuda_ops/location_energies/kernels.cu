// The energies on CUDA GPUs from compute capability 8.0 on; location_energies.h has the mathematics.
//
// A block has 16 frames of an utterance and up to eight of its hypotheses. Each of its eight warps
// convolves the last weights of one hypothesis; then the warps share the units, 32 at a time: a warp
// keeps their keys and location weights in registers while it goes over the hypotheses. Products are
// in common/location_attention.cuh, on tensor cores, with
// float32 operands as two of TF32's. Sums over units have one order.
#include <stdexcept>
#include <string>

#include "common/location_attention.cuh"
#include "location_energies/location_energies.h"

namespace sb_fast_sligru::location_energies::cuda {
namespace {

using namespace location_attention;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kGroup = kWarps;  // hypotheses of a block

// Shared memory: filters, windows, features [hypotheses][16 frames][channels] and partial energies
// [hypotheses][warps][16 frames].
struct Layout {
  int padded_taps, filter_floats, window_floats, feature_bytes;

  SLIGRU_HD Layout(int64_t taps, int operand_bytes)
      : padded_taps(static_cast<int>(ceil_div(taps, kFilterTapsMultiple)) * kFilterTapsMultiple),
        filter_floats(kChannels * filter_stride(padded_taps)),
        window_floats(kGroup * location_attention::window_floats(padded_taps)),
        feature_bytes(kGroup * kTileFrames * kChannels * operand_bytes) {}
  SLIGRU_HD int bytes() const {
    return 4 * (filter_floats + window_floats + kGroup * kWarps * kTileFrames) + feature_bytes;
  }
};

SLIGRU_HD int64_t tiles_of(const Energies& p) { return ceil_div(p.frames, kTileFrames); }
SLIGRU_HD int64_t groups_of(const Energies& p) { return ceil_div(p.beam(), kGroup); }

template <class T>
__global__ void __launch_bounds__(kThreads, 2) energies_kernel(const Energies p) {
#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS
  extern __shared__ __align__(16) char memory[];
  const Layout layout(p.taps, sizeof(T));
  float* filters = reinterpret_cast<float*>(memory);
  float* windows = filters + layout.filter_floats;
  T* features = reinterpret_cast<T*>(windows + layout.window_floats);
  float* partial =
      reinterpret_cast<float*>(reinterpret_cast<char*>(features) + layout.feature_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int64_t tiles = tiles_of(p), groups = groups_of(p);
  const int64_t utterance = blockIdx.x / tiles / groups, group = blockIdx.x / tiles % groups;
  const int64_t first = blockIdx.x % tiles * kTileFrames;  // frame
  const int64_t hypothesis = utterance * p.beam() + group * kGroup;
  const int count = static_cast<int>(min(int64_t{kGroup}, p.beam() - group * kGroup));
  const int taps = layout.padded_taps;

  const float* given = static_cast<const float*>(p.filters);
  for (int i = threadIdx.x; i < kChannels * taps; i += kThreads) {
    const int row = i / taps, tap = i % taps;
    filters[row * filter_stride(taps) + tap] =
        tap < p.taps ? __ldg(given + row * p.taps + tap) : 0.f;
  }
  float* window = windows + warp * location_attention::window_floats(taps);
  if (warp < count) {
    const float* last = static_cast<const float*>(p.last) + (hypothesis + warp) * p.frames;
    for (int i = lane; i < location_attention::window_floats(taps); i += 32) {
      const int64_t frame = first - p.taps / 2 + i;
      window[i] = frame >= 0 && frame < p.frames ? __ldg(last + frame) : 0.f;
    }
  }
  __syncthreads();
  if (warp < count) {
    float f[2][4];
    convolve<T>(window, filters, taps, f);
    store_features(f, kTileFrames, features + warp * kTileFrames * kChannels);
  }
  for (int i = threadIdx.x; i < kGroup * kWarps * kTileFrames; i += kThreads) partial[i] = 0.f;
  __syncthreads();

  const int64_t last_frame = p.frames - 1;
  const T* keys = static_cast<const T*>(p.keys) + utterance * p.frames * p.units;
  const float* queries = static_cast<const float*>(p.query) + hypothesis * p.units;
  for (int64_t unit = warp * kTileUnits; unit < p.units; unit += kWarps * kTileUnits) {
    const int64_t mine = unit + 8 * c;
    const LocationWeights<T> weights(static_cast<const T*>(p.w_location) + unit * kChannels);
    const Eight<float> v = Eight<float>::load(static_cast<const float*>(p.v) + mine);
    const Eight<T> key_g = Eight<T>::load(keys + min(first + g, last_frame) * p.units + mine),
                   key_g8 = Eight<T>::load(keys + min(first + g + 8, last_frame) * p.units + mine);
    for (int n = 0; n < count; ++n) {
      const Eight<float> query = Eight<float>::load(queries + n * p.units + mine);
      const LocationFeatures<T> f(features + n * kTileFrames * kChannels, kTileFrames - 1);
      float s[4][4];
      compute_scores(key_g, key_g8, query, f, weights, s);
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
        float* to = partial + (n * kWarps + warp) * kTileFrames + g;
        to[0] += low;
        to[8] += high;
      }
    }
  }
  __syncthreads();
  float* energies = static_cast<float*>(p.energies) + hypothesis * p.frames;
  for (int i = threadIdx.x; i < count * kTileFrames; i += kThreads) {
    const int n = i / kTileFrames, frame = i % kTileFrames;
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += partial[(n * kWarps + w) * kTileFrames + frame];
    if (first + frame < p.frames) energies[n * p.frames + first + frame] = sum;
  }
#endif
}

}  // namespace

int64_t blocks(const Energies& p) { return tiles_of(p) * groups_of(p) * p.batch; }

void energies(const Energies& p, void* stream) {
  const cudaError_t error = with_operand(p.operand_type, [&](auto operand) {
    using T = decltype(operand);
    const int bytes = Layout(p.taps, sizeof(T)).bytes();
    const cudaError_t allowed = cudaFuncSetAttribute(
        energies_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (allowed != cudaSuccess) return allowed;
    energies_kernel<T>
        <<<static_cast<unsigned>(blocks(p)), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
            p);
    return cudaGetLastError();
  });
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sb_fast_sligru: a kernel did not launch: ") +
                             cudaGetErrorString(error));
}

}  // namespace sb_fast_sligru::location_energies::cuda
