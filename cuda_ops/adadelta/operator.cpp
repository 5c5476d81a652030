// Library _C, operator adadelta_: its schema and its CPU implementation. Built against torch's stable
// ABI, as light_gru/operator.cpp is. adadelta.h has the mathematics.
#include "adadelta/operator.h"

namespace sb_fast_sligru::adadelta {
namespace {

struct Cpu {
  static void update(const Tensor&, const Rule& rule, const std::vector<Parameters>& tensors) {
    cpu::update(rule, tensors);
  }
};

}  // namespace
}  // namespace sb_fast_sligru::adadelta

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "adadelta_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, "
      "Tensor(c!)[] acc_deltas, float lr, float rho, float eps, float weight_decay, bool maximize) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  using sb_fast_sligru::adadelta::Operator;
  using Cpu = sb_fast_sligru::adadelta::Cpu;
  m.impl("adadelta_", TORCH_BOX(&Operator<Cpu>::update));
}
