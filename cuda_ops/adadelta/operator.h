// The boundary of the operator: its arguments, checked and gathered in structs. Each device registers
// its implementation through Operator. `sb_fast_sligru.ops.adadelta_` prepares the arguments;
// adadelta.h has the mathematics.
#pragma once

#include "adadelta/adadelta.h"
#include "common/tensors.h"

namespace sb_fast_sligru::adadelta {

using Tensors = std::vector<Tensor>;

// Whether its elements fill their memory, in whatever order of the axes.
inline bool fills_its_memory(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride and size
  for (int64_t axis = 0; axis < t.dim(); ++axis)
    if (t.size(axis) != 1) axes.emplace_back(t.stride(axis), t.size(axis));
  std::sort(axes.begin(), axes.end());
  int64_t next = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != next) return false;
    next *= size;
  }
  return true;
}

// Whether the same elements lie at the same places of their memory, which they fill.
inline bool same_order(const Tensor& t, const Tensor& other) {
  if (t.numel() == 0 || (t.is_contiguous() && other.is_contiguous())) return true;
  for (int64_t axis = 0; axis < t.dim(); ++axis)
    if (t.size(axis) != 1 && t.stride(axis) != other.stride(axis)) return false;
  return fills_its_memory(t);
}

// Raises unless tensor i of a list called `name` is float32 and in all else like params[i].
inline void check(const char* name, const Tensors& tensors, const Tensors& params, size_t i) {
  const Tensor &t = tensors[i], &param = params[i];
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, "[", i, "]: got ", describe(t),
                  ", expected Float");
  STD_TORCH_CHECK(sizes_of(t) == sizes_of(param), name, "[", i, "]: got ", describe(t),
                  ", expected ", describe(param));
  STD_TORCH_CHECK(t.device() == params[0].device(), name, "[", i,
                  "]: must be on the device of params[0]");
  STD_TORCH_CHECK(same_order(t, param), name, "[", i,
                  "]: expected memory without gaps, in the order of params[", i, "]");
}

// A device's Implementation has update(params, rule, gathered).
template <class Implementation>
struct Operator {
  static void update(const Tensors& params, const Tensors& grads, const Tensors& square_avgs,
                     const Tensors& acc_deltas, double lr, double rho, double eps,
                     double weight_decay, bool maximize) {
    for (const auto& [name, tensors] :
         {std::pair{"grads", &grads}, {"square_avgs", &square_avgs}, {"acc_deltas", &acc_deltas}})
      STD_TORCH_CHECK(tensors->size() == params.size(), name, ": got ", tensors->size(),
                      " tensors, expected ", params.size(), ", as many as params");
    std::vector<Parameters> gathered;
    for (size_t i = 0; i < params.size(); ++i) {
      check("params", params, params, i);
      check("grads", grads, params, i);
      check("square_avgs", square_avgs, params, i);
      check("acc_deltas", acc_deltas, params, i);
      Parameters p = {params[i].numel()};
      p.x = static_cast<float*>(params[i].mutable_data_ptr());
      p.grad = static_cast<const float*>(grads[i].const_data_ptr());
      p.square_avg = static_cast<float*>(square_avgs[i].mutable_data_ptr());
      p.acc_delta = static_cast<float*>(acc_deltas[i].mutable_data_ptr());
      if (p.size > 0) gathered.push_back(p);
    }
    const Rule rule = {static_cast<float>(lr),           static_cast<float>(rho),
                       static_cast<float>(1.0 - rho),    static_cast<float>(eps),
                       static_cast<float>(weight_decay), maximize ? -1.f : 1.f};
    if (!gathered.empty()) Implementation::update(params[0], rule, gathered);
  }
};

}  // namespace sb_fast_sligru::adadelta
