// The boundary of the operator: the arguments of its two ops, checked and gathered in one struct.
// Each device registers its implementation through Operator. `sb_fast_sligru.ops.ctc_loss` prepares
// the arguments; ctc_loss.h has the mathematics and the axes.
#pragma once

#include "common/tensors.h"
#include "ctc_loss/ctc_loss.h"

namespace sb_fast_sligru::ctc_loss {

struct Inputs {
  Tensor log_probs, targets, input_lengths, target_lengths;
  int64_t blank;

  Problem problem() const {
    Problem d = {};
    d.batch = log_probs.size(0);
    d.frames = log_probs.size(1);
    d.vocabulary = log_probs.size(2);
    d.tokens = targets.size(1);
    d.blank = blank;
    d.type = dtype_of(log_probs.scalar_type());
    d.log_probs = log_probs.const_data_ptr();
    d.targets = integers(targets);
    d.input_lengths = integers(input_lengths);
    d.target_lengths = integers(target_lengths);
    return d;
  }

  std::vector<int64_t> alpha_sizes() const {
    return {log_probs.size(0), log_probs.size(1), 2 * targets.size(1) + 1};
  }

  static const int64_t* integers(const Tensor& t) {
    return static_cast<const int64_t*>(t.const_data_ptr());
  }
};

// ---- checks
// Raises unless t has these sizes, this dtype and the device of log_probs; returns it contiguous.
inline Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                      const Tensor& log_probs, ScalarType type = ScalarType::Long) {
  return checked_tensor(name, t, sizes, {type}, log_probs, "log_probs");
}

inline void check_range(const char* name, int64_t value, int64_t most) {
  STD_TORCH_CHECK(value >= 0 && value <= most, name, ": got ", value, ", expected 0 to ", most);
}

// Raises for a bad argument; makes all contiguous.
inline Inputs check_inputs(const Tensor& log_probs, const Tensor& targets,
                           const Tensor& input_lengths, const Tensor& target_lengths,
                           int64_t blank) {
  STD_TORCH_CHECK(log_probs.dim() == 3 && log_probs.size(2) > 0, "log_probs: got ",
                  describe(log_probs), ", expected [B, T, V]");
  const ScalarType type = log_probs.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, "log_probs: got ",
                  describe(log_probs), ", expected float64 or float32");
  const int64_t B = log_probs.size(0);
  STD_TORCH_CHECK(targets.dim() == 2, "targets: got ", describe(targets), ", expected [", B,
                  ", S]");
  STD_TORCH_CHECK(targets.size(1) < int64_t{1} << 30, "targets: got ", describe(targets),
                  ", expected fewer than 2^30 tokens");
  check_range("blank_index", blank, log_probs.size(2) - 1);
  return {torch::stable::contiguous(log_probs),
          checked("targets", targets, {B, targets.size(1)}, log_probs),
          checked("input_lengths", input_lengths, {B}, log_probs),
          checked("target_lengths", target_lengths, {B}, log_probs), blank};
}

// ---- the ops
// As the dispatcher calls them. A device's Implementation has forward(inputs, arguments) and
// backward(inputs, arguments), and check(problem) where the host can read lengths and tokens.
template <class Implementation>
struct Operator {
  static std::tuple<Tensor, Tensor> forward(const Tensor& log_probs, const Tensor& targets,
                                            const Tensor& input_lengths,
                                            const Tensor& target_lengths, int64_t blank_index) {
    const Inputs in = check_inputs(log_probs, targets, input_lengths, target_lengths, blank_index);
    Forward p = {in.problem()};
    Implementation::check(p.problem);
    const ScalarType type = in.log_probs.scalar_type();
    const Tensor loss = new_empty(in.log_probs, {p.problem.batch}, type),
                 log_alpha = new_empty(in.log_probs, in.alpha_sizes(), type);
    p.loss = loss.mutable_data_ptr();
    p.log_alpha = log_alpha.mutable_data_ptr();
    if (p.problem.batch > 0) Implementation::forward(in, p);
    return {loss, log_alpha};
  }

  static Tensor backward(const Tensor& grad_loss, const Tensor& log_probs, const Tensor& targets,
                         const Tensor& input_lengths, const Tensor& target_lengths,
                         const Tensor& log_alpha, int64_t blank_index) {
    const Inputs in = check_inputs(log_probs, targets, input_lengths, target_lengths, blank_index);
    Backward p = {in.problem()};
    Implementation::check(p.problem);
    const ScalarType type = in.log_probs.scalar_type();
    const Tensor grad = checked("grad_loss", grad_loss, {p.problem.batch}, in.log_probs, type),
                 alpha = checked("log_alpha", log_alpha, in.alpha_sizes(), in.log_probs, type),
                 out = new_empty(in.log_probs, sizes_of(in.log_probs), type);
    p.grad_loss = grad.const_data_ptr();
    p.log_alpha = alpha.const_data_ptr();
    p.grad_log_probs = out.mutable_data_ptr();
    if (p.problem.batch * p.problem.frames > 0) Implementation::backward(in, p);
    return out;
  }
};

}  // namespace sb_fast_sligru::ctc_loss
