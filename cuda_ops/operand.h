// See operand.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "recurrence.h"

namespace sb_fast_sligru {

// out [2H, H] of operand_type = u [2H, H] of u_type less its column mean. u_type is operand_type,
// or float32 beside a 16-bit operand_type.
cudaError_t centre_recurrent_weight(const void* u, DType u_type, void* out, DType operand_type,
                                    int64_t hidden, cudaStream_t stream);

}  // namespace sb_fast_sligru
