// Library _C, operator light_gru: its schemas, its CPU implementation, and the choice of a kernel for
// any GPU. Links no CUDA library; the CUDA implementation is operator_cuda.cpp's, in _C_cuda. Built
// against torch's stable ABI: one file loads under any torch >= 2.10 and any Python.
//
//   light_gru           -> h [B, T, D * H] of u's dtype; rho [R, T], empty for Li-GRU, for the backward
//   light_gru_backward  -> gradients of wx, u, h0, ln_weight, ln_bias; empty where need_* is false
//   light_gru_kernel    -> the line of choice.h's table that a GPU of these properties would take
//
// wx [B, T, 2H], u [2H, H], h0 and drop_mask [R, H], ln_* [2H], lengths int32 [B]; see recurrence.h
// for the axes.
// Matrix operands are rounded to operand_dtype; h0, drop_mask and ln_* come in the accumulation
// type.
#include "light_gru/operator.h"

#include <numeric>

#include "few_rows/few_rows.h"
#include "light_gru/choice.h"
#include "light_gru/sweep.h"

namespace sb_fast_sligru {
namespace {

// Rows in the order of their lengths, so that those whose sequences go on are always the first.
class CpuSteps {
 public:
  static constexpr int64_t kChunkBytes = int64_t{8} << 20;  // near the last-level cache

  explicit CpuSteps(const Inputs& in) : rows_(in.rows()) {
    if (!in.lengths) return;
    const int32_t* lengths = in.lengths->const_data_ptr<int32_t>();
    int64_t frames = 0;
    for (int64_t b = 0; b < in.batch(); ++b) {
      STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] <= in.time(), "lengths: got ", lengths[b],
                      ", expected 0 to T = ", in.time());
      if (in.packed()) starts_.push_back(static_cast<int32_t>(frames));
      frames += lengths[b];
    }
    STD_TORCH_CHECK(!in.packed() || frames == in.wx.size(0), "lengths: their sum is ", frames,
                    ", expected that of the frames of wx, ", in.wx.size(0));
    const auto length_of = [&](int32_t row) { return lengths[row % in.batch()]; };
    order_.resize(rows_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int32_t row, int32_t other) { return length_of(row) > length_of(other); });
    active_.resize(in.time());
    directions_meet_.resize(in.time());
    for (const int32_t row : order_) {
      const int32_t length = length_of(row);
      for (int32_t n = 0; n < length; ++n) ++active_[n];
      if (length % 2 == 1) directions_meet_[length / 2] = true;
    }
  }

  // For a result of all frames, whose padding, if there may be any, is zero.
  Tensor new_frames(const Inputs& in, int64_t n, ScalarType type) const {
    return in.lengths && !in.packed() ? new_zeros(in.wx, in.frame_sizes(n), type)
                                      : new_empty(in.wx, in.frame_sizes(n), type);
  }
  // A layer as its steps see it.
  Recurrence layer(const Inputs& in) const {
    Recurrence layer = in.recurrence();
    if (in.lengths) layer.order = order_.data();
    if (in.packed()) layer.starts = starts_.data();
    return layer;
  }
  int64_t active_rows(int64_t step) const { return active_.empty() ? rows_ : active_[step]; }
  bool directions_meet(const Inputs& in, int64_t step) const {
    return directions_meet_.empty() ? 2 * step + 1 == in.time() : directions_meet_[step];
  }

  // Centred when a LayerNorm follows: see cell.h.
  Tensor recurrent_operand(const Inputs& in) const {
    return in.layer_norm ? subtract_column_mean(in.u) : in.u;
  }
  void forward_step(const ForwardStep& p, int64_t step) const { cpu::forward_step(p, step); }
  void gather_previous(const GatherPrevious& p) const { cpu::gather_previous(p); }
  void backward_step(const BackwardStep& p, int64_t step) const { cpu::backward_step(p, step); }
  void finish_carry(const FinishCarry& p) const { cpu::finish_carry(p); }

 private:
  int64_t rows_;
  std::vector<int32_t> order_, starts_;
  std::vector<int64_t> active_;        // rows a step
  std::vector<bool> directions_meet_;  // of any sequence, in the step
};

// To centre U takes as long as several steps: the forward pass, which may have one, centres U h.
struct CpuForwardSteps : CpuSteps {
  using CpuSteps::CpuSteps;
  // For more rows a BLAS is as fast, fastest when it writes r transposed.
  static constexpr int64_t kFewRows = 16;

  Tensor recurrent_operand(const Inputs& in) const { return in.u; }
  bool writes_transposed(const Inputs& in, int64_t rows) const {
    return in.acc_type() != ScalarType::Float || rows > kFewRows ||
           !few_rows::cpu::has_wide_vectors();
  }
  void product(const Tensor& operand, const Tensor& u_t, const Tensor& r) const {
    few_rows::Linear p = {operand.size(0), u_t.size(1), u_t.size(0)};
    p.x = static_cast<const float*>(operand.const_data_ptr());
    p.x_row = operand.stride(0);
    p.weight = static_cast<const float*>(u_t.const_data_ptr());
    p.out = static_cast<float*>(r.mutable_data_ptr());
    few_rows::cpu::linear(p);
  }
};

// The CPU computes 16-bit problems in float32 throughout: rounding the operands would cost time,
// not save it.
Inputs widen(Inputs in) {
  in.operand_type = in.acc_type();
  in.wx = torch::stable::to(in.wx, in.acc_type());
  in.u = torch::stable::to(in.u, in.acc_type());
  return in;
}

struct Cpu {
  static void check_backend(const std::string& backend) {
    STD_TORCH_CHECK(backend == "cpu", "backend: got \"", backend,
                    "\", expected \"cpu\" for tensors on the CPU");
  }

  static Outputs forward(const std::string& backend, const Inputs& in) {
    check_backend(backend);
    auto [h, rho] = forward_sweep(widen(in), CpuForwardSteps(in));
    return {torch::stable::to(h, in.u.scalar_type()), rho};
  }

  static Gradients backward(const std::string& backend, const Inputs& in, const Saved& saved,
                            Needs needs) {
    check_backend(backend);
    const Saved wide{torch::stable::to(saved.grad_h, in.acc_type()),
                     torch::stable::to(saved.h, in.acc_type()), saved.rho};
    auto [grad_wx, grad_u, grad_h0, grad_ln_weight, grad_ln_bias] =
        backward_sweep(widen(in), wide, needs, CpuSteps(in));
    return {torch::stable::to(grad_wx, in.wx.scalar_type()),
            torch::stable::to(grad_u, in.u.scalar_type()), grad_h0, grad_ln_weight, grad_ln_bias};
  }
};

std::tuple<std::string, int64_t, int64_t, int64_t, std::string> light_gru_kernel(
    int64_t hidden, int64_t rows, ScalarType operand_dtype, bool backward, int64_t capability,
    bool has_tensor_code, bool has_cluster_code, bool has_warpgroup_code, int64_t shared_bytes,
    int64_t multiprocessors, int64_t clusters_of_4, int64_t clusters_of_8, int64_t clusters_of_16) {
  Gpu gpu = {};
  gpu.capability = static_cast<int>(capability);
  gpu.has_tensor_code = has_tensor_code;
  gpu.has_cluster_code = has_cluster_code;
  gpu.has_warpgroup_code = has_warpgroup_code;
  gpu.shared_bytes = static_cast<int>(shared_bytes);
  gpu.multiprocessors = static_cast<int>(multiprocessors);
  gpu.clusters_of_4 = static_cast<int>(clusters_of_4);
  gpu.clusters_of_8 = static_cast<int>(clusters_of_8);
  gpu.clusters_of_16 = static_cast<int>(clusters_of_16);
  const KernelChoice choice = choose(hidden, std::max<int64_t>(rows, 1), dtype_of(operand_dtype),
                                     backward ? Direction::kBackward : Direction::kForward, gpu);
  return {name_of(choice.kernel), choice.group, choice.units, choice.rows, choice.reason};
}

}  // namespace
}  // namespace sb_fast_sligru

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "light_gru(Tensor wx, Tensor u, Tensor? h0, Tensor? drop_mask, Tensor? ln_weight, "
      "Tensor? ln_bias, Tensor? lengths, SymInt? packed_time, bool layer_norm, float eps, "
      "str activation, bool bidirectional, str operand_dtype, str backend) "
      "-> (Tensor h, Tensor rho)");
  m.def(
      "light_gru_backward(Tensor grad_h, Tensor wx, Tensor u, Tensor? h0, Tensor? drop_mask, "
      "Tensor? ln_weight, Tensor? ln_bias, Tensor? lengths, SymInt? packed_time, bool layer_norm, "
      "float eps, str activation, bool bidirectional, str operand_dtype, str backend, Tensor h, "
      "Tensor rho, bool need_wx, bool need_u, bool need_h0, bool need_ln) "
      "-> (Tensor grad_wx, Tensor grad_u, Tensor grad_h0, Tensor grad_ln_weight, "
      "Tensor grad_ln_bias)");
  m.def(
      "light_gru_kernel(int hidden, int rows, ScalarType operand_dtype, bool backward, "
      "int capability, bool has_tensor_code, bool has_cluster_code, bool has_warpgroup_code, int "
      "shared_bytes, int multiprocessors, "
      "int clusters_of_4, int clusters_of_8, int clusters_of_16) "
      "-> (str kernel, int group, int units, int rows, str reason)");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  using sb_fast_sligru::Cpu;
  using sb_fast_sligru::Operator;
  m.impl("light_gru", TORCH_BOX(&Operator<Cpu>::forward));
  m.impl("light_gru_backward", TORCH_BOX(&Operator<Cpu>::backward));
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CompositeExplicitAutograd, m) {
  m.impl("light_gru_kernel", TORCH_BOX(&sb_fast_sligru::light_gru_kernel));
}
