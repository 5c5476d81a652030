// The boundary of the operator: its arguments, checked and gathered in one struct. Each device
// registers its implementation through Operator. `sb_fast_sligru.ops.location_energies` prepares the
// arguments; location_energies.h has the mathematics and the axes.
#pragma once

#include "common/tensors.h"
#include "location_energies/location_energies.h"

namespace sb_fast_sligru::location_energies {

// A device's Implementation has energies(keys, arguments).
template <class Implementation>
struct Operator {
  static Tensor energies(const Tensor& query, const Tensor& last, const Tensor& keys,
                         const Tensor& filters, const Tensor& w_location, const Tensor& v) {
    STD_TORCH_CHECK(keys.dim() == 3, "keys: got ", describe(keys), ", expected [B, T, A]");
    const int64_t B = keys.size(0), T = keys.size(1), A = keys.size(2);
    STD_TORCH_CHECK(query.dim() == 2 && (B == 0 ? query.size(0) == 0 : query.size(0) % B == 0),
                    "query: got ", describe(query), ", expected [N, ", A, "], N a multiple of ", B);
    STD_TORCH_CHECK(filters.dim() == 2 && filters.size(1) % 2 == 1, "filters: got ",
                    describe(filters), ", expected [G, W], W odd");
    const int64_t N = query.size(0), G = filters.size(0), W = filters.size(1);
    const ScalarType operand = keys.scalar_type(),
                     wide = operand == ScalarType::Double ? operand : ScalarType::Float;
    auto checked = [&](const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                       ScalarType type) {
      return checked_tensor(name, t, sizes, {type}, keys, "keys");
    };
    const Tensor own_keys = torch::stable::contiguous(keys),
                 own_query = checked("query", query, {N, A}, wide),
                 own_last = checked("last", last, {N, T}, wide),
                 own_filters = checked("filters", filters, {G, W}, wide),
                 own_weights = checked("w_location", w_location, {A, G}, operand),
                 own_v = checked("v", v, {A}, wide);
    const Tensor result = new_empty(keys, {N, T}, wide);
    Energies p = {B, N, T, A, G, W};
    p.operand_type = dtype_of(operand);
    p.query = own_query.const_data_ptr();
    p.last = own_last.const_data_ptr();
    p.keys = own_keys.const_data_ptr();
    p.filters = own_filters.const_data_ptr();
    p.w_location = own_weights.const_data_ptr();
    p.v = own_v.const_data_ptr();
    p.energies = result.mutable_data_ptr();
    if (N > 0 && T > 0) Implementation::energies(keys, p);
    return result;
  }
};

}  // namespace sb_fast_sligru::location_energies
