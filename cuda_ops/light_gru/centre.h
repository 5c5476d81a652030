// See centre.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "light_gru/recurrence.h"

namespace sb_fast_sligru {

// out [2H, H] = matrix [2H, H] less its column mean. The matrix has the type of out, or is float32
// beside a 16-bit out.
cudaError_t centre_columns(const void* matrix, DType matrix_type, void* out, DType out_type,
                           int64_t hidden, cudaStream_t stream);

}  // namespace sb_fast_sligru
