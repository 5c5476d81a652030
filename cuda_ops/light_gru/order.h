// See order.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "light_gru/recurrence.h"

namespace sb_fast_sligru {

// Fills order [R], Recurrence::order of a layer that has lengths.
cudaError_t order_rows(const Recurrence& layer, int32_t* order, cudaStream_t stream);

}  // namespace sb_fast_sligru
