// Tensors through torch's stable ABI: what every operator's host code needs of them. Only files that
// end in operator.cpp or operator_cuda.cpp, and what they include, see tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/types.h"

namespace sb_fast_sligru {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string describe(const Tensor& t) {
  std::string text = std::string(torch::headeronly::toString(t.scalar_type())) + " [";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// Raises unless t has these sizes, one of the dtypes, of which the first is the usual one, and the
// device of `other`, an argument called `other_name`; returns it contiguous.
inline Tensor checked_tensor(const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                             const std::vector<ScalarType>& types, const Tensor& other,
                             const char* other_name) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size()) &&
              std::find(types.begin(), types.end(), t.scalar_type()) != types.end();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  std::string expected;
  for (size_t i = 0; i < sizes.size(); ++i) expected += (i ? ", " : "") + std::to_string(sizes[i]);
  STD_TORCH_CHECK(same, name, ": got ", describe(t), ", expected ",
                  torch::headeronly::toString(types[0]), " [", expected, "]");
  STD_TORCH_CHECK(t.device() == other.device(), name, ": must be on the device of ", other_name);
  return torch::stable::contiguous(t);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < t.dim(); ++axis) sizes.push_back(t.size(axis));
  return sizes;
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The dtype of an op's argument that names one. Not a ScalarType in the schema: AOTInductor of torch
// 2.10 and 2.11 hands over the number that torch.export saves, which stands for another.
inline ScalarType type_named(const char* argument, const std::string& name) {
  constexpr std::pair<const char*, ScalarType> kTypes[] = {{"float64", ScalarType::Double},
                                                           {"float32", ScalarType::Float},
                                                           {"bfloat16", ScalarType::BFloat16},
                                                           {"float16", ScalarType::Half}};
  for (const auto& [known, type] : kTypes) {
    if (name == known) return type;
  }
  STD_TORCH_CHECK(false, argument, ": got \"", name,
                  "\", expected float64, float32, bfloat16 or float16");
}

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

inline Tensor with_unit_last_stride(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// The persistent kernels read 16 bytes at a time.
inline Tensor aligned(const Tensor& t) {
  constexpr int64_t kBytes = 16;
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2, last = t.dim() - 1;
  bool fits = t.stride(last) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kBytes == 0;
  for (int64_t axis = 0; axis < last; ++axis) fits = fits && t.stride(axis) * size % kBytes == 0;
  return fits ? t : torch::stable::clone(torch::stable::contiguous(t));
}

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

inline Tensor new_zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

inline const void* pointer(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// out = a b, of matrices or of batches of them. For 16-bit operands `out` may be float32, which the
// accumulator then reaches unrounded.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const char* name = a.dim() == 3 ? "aten::bmm" : "aten::mm";
  if (a.scalar_type() == out.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);  // takes the returned reference back
  } else {
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(name, "dtype_out", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);
  }
}

inline Tensor sum_rows(const Tensor& t, bool keepdim = false) {
  const std::vector<int64_t> first_axis{0};
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(first_axis), keepdim);
}

inline Tensor subtract_column_mean(const Tensor& t) {
  return torch::stable::subtract(t, sum_rows(t, /*keepdim=*/true),
                                 1.0 / static_cast<double>(t.size(0)));
}

}  // namespace sb_fast_sligru
