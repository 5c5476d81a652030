// Library _C_cuda, operator location_energies: the CUDA implementation of what operator.cpp declares,
// on the caller's device and stream.
#include "common/cuda_device.h"
#include "common/location_attention.h"
#include "location_energies/operator.h"

namespace sb_fast_sligru::location_energies {
namespace {

using namespace location_attention;

struct Cuda {
  static void energies(const Tensor& keys, const Energies& p) {
    const OnDeviceOf device(keys);
    STD_TORCH_CHECK(p.operand_type != DType::kFloat64 && p.units % kTileUnits == 0 &&
                        p.channels == kChannels && p.taps <= kMostTaps,
                    "keys: got ", describe(keys), ", ", p.channels, " filters of ", p.taps,
                    " taps, which the CUDA kernels cannot take");
    STD_TORCH_CHECK(cuda::blocks(p) < int64_t{1} << 31,
                    "query: too many hypotheses and frames for one launch");
    for (const void* operand : {p.keys, p.query, p.v, p.w_location})
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(operand) % 16 == 0,
                      "keys, query, v, w_location: expected memory on 16 bytes");
    cuda::energies(p, device.stream());
  }
};

}  // namespace
}  // namespace sb_fast_sligru::location_energies

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  using sb_fast_sligru::location_energies::Operator;
  using Cuda = sb_fast_sligru::location_energies::Cuda;
  m.impl("location_energies", TORCH_BOX(&Operator<Cuda>::energies));
}
