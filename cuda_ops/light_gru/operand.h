// U as the products of the CUDA backends read it.
#pragma once

#include "common/cuda_device.h"
#include "light_gru/centre.h"
#include "light_gru/operator.h"

namespace sb_fast_sligru {

// A [2H, H] matrix less its column mean.
inline Tensor centred(const Tensor& matrix, ScalarType type, cudaStream_t stream) {
  const int64_t hidden = matrix.size(1);
  const Tensor out = new_empty(matrix, {2 * hidden, hidden}, type);
  check_launch(centre_columns(matrix.const_data_ptr(), dtype_of(matrix.scalar_type()),
                              out.mutable_data_ptr(), dtype_of(type), hidden, stream));
  return out;
}

// U as the products read it: centred when a LayerNorm follows, in the operand type.
inline Tensor recurrent_operand(const Inputs& in, cudaStream_t stream) {
  return in.layer_norm ? centred(in.u, in.operand_type, stream)
                       : torch::stable::to(in.u, in.operand_type);
}

}  // namespace sb_fast_sligru
