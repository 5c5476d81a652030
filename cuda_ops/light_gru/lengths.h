// See lengths.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "light_gru/recurrence.h"

namespace sb_fast_sligru {

// What the lengths of a layer come to.
struct LengthArrays {
  int32_t* order;  // [R], Recurrence::order
  int32_t*
      lengths;  // [B], Recurrence::lengths within their bounds: 0 to T and, packed, `frames` in all
  int32_t* starts;  // [B], Recurrence::starts
};

// Fills the arrays; frames: those of packed sequences, or none is too many.
cudaError_t resolve_lengths(const Recurrence& layer, int64_t frames, const LengthArrays& arrays,
                            cudaStream_t stream);

// Zeros the padding of [B, T, n], whose frames have so many bytes, an even number.
cudaError_t clear_padding(const Recurrence& layer, void* data, int64_t frame_bytes,
                          cudaStream_t stream);

}  // namespace sb_fast_sligru
