// See lengths.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "light_gru/recurrence.h"

namespace sb_fast_sligru {

// Fills order [R], Recurrence::order of a layer that has lengths, and starts [B], Recurrence::starts,
// unless it is null.
cudaError_t order_rows(const Recurrence& layer, int32_t* order, int32_t* starts,
                       cudaStream_t stream);

// Zeros the padding of [B, T, n], whose frames have so many bytes, an even number.
cudaError_t clear_padding(const Recurrence& layer, void* data, int64_t frame_bytes,
                          cudaStream_t stream);

}  // namespace sb_fast_sligru
