// Where the rows of a batch with lengths are served and lie, on the GPU.
#pragma once

#include "common/cuda_device.h"
#include "light_gru/operator.h"
#include "light_gru/order.h"

namespace sb_fast_sligru {

class Places {
 public:
  Places(const Inputs& in, cudaStream_t stream) {
    if (!in.lengths || in.rows() == 0) return;
    rows_ = in.rows();
    packed_ = in.packed();
    memory_ = new_empty(in.wx, {rows_ + in.batch()}, ScalarType::Int);
    auto* order = memory_.mutable_data_ptr<int32_t>();
    check_launch(order_rows(in.recurrence(), order, packed_ ? order + rows_ : nullptr, stream));
  }

  const int32_t* starts() const { return packed_ ? order() + rows_ : nullptr; }

  // A layer whose rows are served in the order of their lengths.
  Recurrence layer(const Inputs& in) const {
    Recurrence layer = in.recurrence();
    layer.order = rows_ > 0 ? order() : nullptr;
    layer.starts = starts();
    return layer;
  }

 private:
  const int32_t* order() const { return memory_.const_data_ptr<int32_t>(); }

  Tensor memory_;  // Recurrence::order, then Recurrence::starts
  int64_t rows_ = 0;
  bool packed_ = false;
};

}  // namespace sb_fast_sligru
