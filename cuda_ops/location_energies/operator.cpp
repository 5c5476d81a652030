// Library _C, operator location_energies: its schema and its CPU implementation. Built against
// torch's stable ABI, as light_gru/operator.cpp is. location_energies.h has the mathematics and the
// axes.
#include "location_energies/operator.h"

namespace sb_fast_sligru::location_energies {
namespace {

struct Cpu {
  static void energies(const Tensor& keys, const Energies& p) {
    STD_TORCH_CHECK(p.operand_type == DType::kFloat64 || p.operand_type == DType::kFloat32,
                    "keys: got ", describe(keys), ", which the CPU kernels cannot take");
    cpu::energies(p);
  }
};

}  // namespace
}  // namespace sb_fast_sligru::location_energies

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "location_energies(Tensor query, Tensor last, Tensor keys, Tensor filters, "
      "Tensor w_location, Tensor v) -> Tensor energies");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  using sb_fast_sligru::location_energies::Operator;
  using Cpu = sb_fast_sligru::location_energies::Cpu;
  m.impl("location_energies", TORCH_BOX(&Operator<Cpu>::energies));
}
