// Library _C, operator ctc_loss: its schemas and its CPU implementation. Built against torch's stable
// ABI, as light_gru/operator.cpp is.
//
//   ctc_loss           -> loss [B], log_alpha [B, T, 2 S + 1] for the backward
//   ctc_loss_backward  -> gradient of log_probs
//
// ctc_loss.h has the mathematics and the axes.
#include "ctc_loss/operator.h"

namespace sb_fast_sligru::ctc_loss {
namespace {

struct Cpu {
  // Raises unless lengths, and the tokens that count, are in range.
  static void check(const Problem& d) {
    for (int64_t b = 0; b < d.batch; ++b) {
      check_range("input_lengths", d.input_lengths[b], d.frames);
      check_range("target_lengths", d.target_lengths[b], d.tokens);
      for (int64_t i = 0; i < d.target_lengths[b]; ++i)
        check_range("targets", d.target(b)[i], d.vocabulary - 1);
    }
  }

  static void forward(const Inputs&, const Forward& p) { cpu::forward(p); }
  static void backward(const Inputs&, const Backward& p) { cpu::backward(p); }
};

}  // namespace
}  // namespace sb_fast_sligru::ctc_loss

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "ctc_loss(Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, "
      "int blank_index) -> (Tensor loss, Tensor log_alpha)");
  m.def(
      "ctc_loss_backward(Tensor grad_loss, Tensor log_probs, Tensor targets, Tensor input_lengths, "
      "Tensor target_lengths, Tensor log_alpha, int blank_index) -> Tensor grad_log_probs");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  using sb_fast_sligru::ctc_loss::Operator;
  using Cpu = sb_fast_sligru::ctc_loss::Cpu;
  m.impl("ctc_loss", TORCH_BOX(&Operator<Cpu>::forward));
  m.impl("ctc_loss_backward", TORCH_BOX(&Operator<Cpu>::backward));
}
