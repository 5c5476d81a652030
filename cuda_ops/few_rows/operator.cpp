// Library _C, operator few_rows_linear: its schema and its CPU implementation. Built against torch's
// stable ABI, as light_gru/operator.cpp is. `sb_fast_sligru.ops.few_rows_linear` tells where it is
// faster than PyTorch's.
#include "common/tensors.h"
#include "few_rows/few_rows.h"

namespace sb_fast_sligru::few_rows {
namespace {

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, OptionalTensor bias) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, "x: got ", describe(x),
                  ", expected Float [N, K]");
  STD_TORCH_CHECK(weight.dim() == 2, "weight: got ", describe(weight), ", expected [M, K]");
  const int64_t N = x.size(0), K = x.size(1), M = weight.size(0);
  const Tensor rows = with_unit_last_stride(x),
               weights = checked_tensor("weight", weight, {M, K}, {ScalarType::Float}, x, "x");
  if (bias) bias = checked_tensor("bias", *bias, {M}, {ScalarType::Float}, x, "x");
  const Tensor out = new_empty(x, {N, M}, ScalarType::Float);
  Linear p = {N, M, K, floats(rows), rows.stride(0), floats(weights)};
  p.bias = bias ? floats(*bias) : nullptr;
  p.out = static_cast<float*>(out.mutable_data_ptr());
  cpu::linear(p);
  return out;
}

}  // namespace
}  // namespace sb_fast_sligru::few_rows

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  m.impl("few_rows_linear", TORCH_BOX(&sb_fast_sligru::few_rows::few_rows_linear));
}
