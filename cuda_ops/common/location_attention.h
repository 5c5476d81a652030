// The tiles of location_attention.cuh. No torch and no CUDA headers.
#pragma once

namespace sb_fast_sligru::location_attention {

constexpr int kChannels = 16;   // padded with zeros
constexpr int kMostTaps = 495;  // their windows, one a warp, have to fit into shared memory
constexpr int kFilterTapsMultiple = 8;
constexpr int kTileFrames = 16, kTileUnits = 32;

}  // namespace sb_fast_sligru::location_attention
