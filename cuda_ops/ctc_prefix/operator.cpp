// Library _C, operator ctc_prefix: its schemas and its CPU implementation. Built against torch's
// stable ABI, as light_gru/operator.cpp is.
//
//   ctc_prefix_scores  -> psi [N, V]
//   ctc_prefix_extend  -> state [M, 2, T + 1] of the hypotheses that a search goes on with
//
// ctc_prefix.h has the mathematics and the axes.
#include "ctc_prefix/operator.h"

namespace sb_fast_sligru::ctc_prefix {
namespace {

struct Cpu {
  static void check(const char* name, const Tensor& t, int64_t size) { check_range(name, t, size); }
  static void scores(const Tensor&, const Scores& p) { cpu::scores(p); }
  static void extend(const Tensor&, const Extension& p) { cpu::extend(p); }
};

}  // namespace
}  // namespace sb_fast_sligru::ctc_prefix

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "ctc_prefix_scores(Tensor log_probs, Tensor lengths, Tensor state, Tensor last_tokens, "
      "Tensor? candidates, Tensor? window, int blank_index, int eos_index) -> Tensor psi");
  m.def(
      "ctc_prefix_extend(Tensor log_probs, Tensor lengths, Tensor state, Tensor last_tokens, "
      "Tensor parents, Tensor tokens, Tensor? window, int blank_index) -> Tensor state");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  using sb_fast_sligru::ctc_prefix::Operator;
  using Cpu = sb_fast_sligru::ctc_prefix::Cpu;
  m.impl("ctc_prefix_scores", TORCH_BOX(&Operator<Cpu>::scores));
  m.impl("ctc_prefix_extend", TORCH_BOX(&Operator<Cpu>::extend));
}
