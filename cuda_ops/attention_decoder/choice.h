// What the persistent kernels can take. No torch and no CUDA headers, so that a GPU can be pretended.
#pragma once

#include <cstdint>
#include <string>

#include "common/location_attention.h"
#include "common/types.h"

namespace sb_fast_sligru::attention_decoder {

constexpr int64_t kMostChannels = location_attention::kChannels;
constexpr int64_t kMostTaps = location_attention::kMostTaps;

// What keeps them from serving a call, "" if nothing does.
inline std::string persistent_obstacle(bool has_tensor_code, DType operand_type, int64_t channels,
                                       int64_t taps) {
  if (operand_type == DType::kFloat64) return "the attention decoder has no float64 CUDA kernels";
  if (!has_tensor_code)
    return "the attention decoder's kernels need compute capability 8.0 or newer, and code for it "
           "in the library";
  if (channels > kMostChannels)
    return "the attention has " + std::to_string(channels) +
           " location channels, the kernels take " + std::to_string(kMostChannels);
  if (taps > kMostTaps)
    return "the location filters have " + std::to_string(taps) + " taps, the kernels take " +
           std::to_string(kMostTaps);
  return "";
}

}  // namespace sb_fast_sligru::attention_decoder
