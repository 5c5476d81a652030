// Where the rows of a batch with lengths are served and lie, on the GPU.
#pragma once

#include <limits>

#include "common/cuda_device.h"
#include "light_gru/lengths.h"
#include "light_gru/operator.h"

namespace sb_fast_sligru {

class Places {
 public:
  Places(const Inputs& in, cudaStream_t stream) : layer_(in.recurrence()), stream_(stream) {
    if (!in.lengths || in.rows() == 0) return;
    memory_ = new_empty(in.wx, {in.rows() + 2 * in.batch()}, ScalarType::Int);
    auto* order = memory_.mutable_data_ptr<int32_t>();
    const LengthArrays arrays = {order, order + in.rows(), order + in.rows() + in.batch()};
    const int64_t frames = in.packed() ? in.wx.size(0) : std::numeric_limits<int64_t>::max();
    check_launch(resolve_lengths(layer_, frames, arrays, stream));
    layer_.order = arrays.order;
    layer_.lengths = arrays.lengths;
    if (in.packed()) layer_.starts = arrays.starts;
  }

  // The layer, whose rows are served in the order of their lengths.
  const Recurrence& layer() const { return layer_; }

  // For a result of all frames, whose padding, if there may be any, is zero.
  Tensor new_frames(const Inputs& in, int64_t n, ScalarType type) const {
    const Tensor frames = new_empty(in.wx, in.frame_sizes(n), type);
    if (layer_.order != nullptr && !in.packed() && in.time() > 0) {
      const int64_t bytes = n * (type == ScalarType::Double  ? 8
                                 : type == ScalarType::Float ? 4
                                                             : 2);
      check_launch(clear_padding(layer_, frames.mutable_data_ptr(), bytes, stream_));
    }
    return frames;
  }

 private:
  Recurrence layer_;
  cudaStream_t stream_;
  Tensor memory_;  // of the layer's order, lengths and starts
};

}  // namespace sb_fast_sligru
