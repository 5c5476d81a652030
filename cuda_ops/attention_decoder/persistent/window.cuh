// The window of last weights that a warp convolves, in both passes; common/location_attention.cuh has
// the rest of what is inside the attention's tanh.
#pragma once

#include "attention_decoder/persistent/persistent.h"
#include "common/location_attention.cuh"

namespace sb_fast_sligru::attention_decoder {

__device__ __forceinline__ int length_of(const Shape& shape, int row) {
  const int64_t length = shape.lengths[row];
  return length < 0 ? 0 : length > shape.frames ? shape.frames : static_cast<int>(length);
}

// p_{token - 1} around a tile's frames, by one warp.
__device__ __forceinline__ void load_window(const Shape& shape, const float* attention, int row,
                                            int token, int tile, float* window) {
  const int first = tile * kTileFrames - shape.taps / 2, length = length_of(shape, row);
  const float* previous =
      attention + (static_cast<int64_t>(row) * shape.tokens + token - 1) * shape.frames;
  const float even = 1.f / static_cast<float>(length);
  for (int i = threadIdx.x % 32; i < window_floats(shape.padded_taps()); i += 32) {
    const int frame = first + i;
    const bool inside = frame >= 0 && frame < shape.frames;
    if (token > 0) {
      window[i] = inside ? __ldcg(previous + frame) : 0.f;
    } else {
      // SpeechBrain's mask times 1 / length, which is NaN where the length is 0.
      window[i] = inside ? (frame < length ? 1.f : 0.f) * even : 0.f;
    }
  }
  __syncwarp();
}

}  // namespace sb_fast_sligru::attention_decoder
