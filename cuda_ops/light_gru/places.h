// Where the rows of a batch with lengths are served and lie, on the GPU.
#pragma once

#include "common/cuda_device.h"
#include "light_gru/lengths.h"
#include "light_gru/operator.h"

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

  // For a result of all frames, whose padding, if there may be any, is zero.
  static Tensor new_frames(const Inputs& in, int64_t n, ScalarType type, cudaStream_t stream) {
    const Tensor frames = new_empty(in.wx, in.frame_sizes(n), type);
    if (in.lengths && !in.packed() && in.batch() * in.time() > 0) {
      const int64_t bytes = n * (type == ScalarType::Double  ? 8
                                 : type == ScalarType::Float ? 4
                                                             : 2);
      check_launch(clear_padding(in.recurrence(), frames.mutable_data_ptr(), bytes, stream));
    }
    return frames;
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
