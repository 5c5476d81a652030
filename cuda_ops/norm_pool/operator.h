// The boundary of the operator: the arguments of its two ops, checked and gathered in one struct.
// Each device registers its implementation through Operator. `sb_fast_sligru.ops.norm_pool` prepares
// the arguments; norm_pool.h has the mathematics and the axes.
#pragma once

#include "common/tensors.h"
#include "norm_pool/norm_pool.h"

namespace sb_fast_sligru::norm_pool {

struct Inputs {
  Tensor x, bias, ln_weight, ln_bias;
  OptionalTensor drop_mask;
  double eps, negative_slope;
  int64_t pool_time, pool_frequency;
  bool halo;
  ScalarType out_type;
  int64_t frames, out_frames;

  ScalarType acc_type() const { return accumulation_type(x.scalar_type()); }

  NormPool layer() const {
    NormPool layer = {};
    layer.batch = x.size(0);
    layer.time = frames;
    layer.x_time = x.size(1);
    layer.least_out_time = out_frames;
    layer.frequencies = x.size(2);
    layer.channels = x.size(3);
    layer.pool_time = pool_time;
    layer.pool_frequency = pool_frequency;
    layer.halo = halo;
    layer.eps = eps;
    layer.slope = negative_slope;
    layer.x_type = dtype_of(x.scalar_type());
    layer.out_type = dtype_of(out_type);
    layer.x = x.const_data_ptr();
    layer.bias = bias.const_data_ptr();
    layer.ln_weight = ln_weight.const_data_ptr();
    layer.ln_bias = ln_bias.const_data_ptr();
    layer.drop_mask = pointer(drop_mask);
    return layer;
  }
};

// What the backward receives beside the forward's arguments.
struct Saved {
  Tensor grad_out, statistics;
};

// Which gradients are wanted; those that are not come back as empty tensors.
struct Needs {
  bool x;
  bool parameters;  // bias, ln_weight, ln_bias
};

// The output and what the backward wants of the statistics.
using Outputs = std::tuple<Tensor, Tensor>;
// Of x, bias, ln_weight, ln_bias.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// ---- checks
// Raises unless t has these sizes, this dtype and the device of x; returns it contiguous.
inline Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                      const Tensor& x, ScalarType type) {
  return checked_tensor(name, t, sizes, {type}, x, "x");
}

// Raises for a bad argument; makes all contiguous.
inline Inputs check_inputs(const Tensor& x, const Tensor& bias, const Tensor& ln_weight,
                           const Tensor& ln_bias, OptionalTensor drop_mask, double eps,
                           double negative_slope, int64_t pool_time, int64_t pool_frequency,
                           bool halo, const std::string& out_dtype, int64_t frames,
                           int64_t out_frames) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x: got ",
                  describe(x), ", expected [B, T, F, C]");
  const ScalarType type = x.scalar_type(), acc = accumulation_type(type);
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float ||
                      type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "x: got ", describe(x), ", expected float64, float32, bfloat16 or float16");
  const ScalarType out_type = type_named("out_dtype", out_dtype);
  STD_TORCH_CHECK(out_type == type || out_type == acc, "out_dtype: got ",
                  torch::headeronly::toString(out_type), " beside x of ",
                  torch::headeronly::toString(type));
  const int64_t B = x.size(0), F = x.size(2), C = x.size(3);
  STD_TORCH_CHECK(frames >= 1 && frames <= x.size(1), "frames: got ", frames, ", expected 1 to ",
                  x.size(1), ", those of x");
  auto check_pool = [&](const char* name, int64_t pool, int64_t size) {
    STD_TORCH_CHECK(pool >= 1, name, ": got ", pool, ", expected 1 or more");
    STD_TORCH_CHECK(size / pool >= (halo ? 2 : 1), "x: got ", describe(x), ", too small for ", name,
                    " = ", pool, halo ? " and a halo" : "");
  };
  check_pool("pool_time", pool_time, frames);
  check_pool("pool_frequency", pool_frequency, F);
  Inputs in{torch::stable::contiguous(x),
            checked("bias", bias, {C}, x, acc),
            checked("ln_weight", ln_weight, {F, C}, x, acc),
            checked("ln_bias", ln_bias, {F, C}, x, acc),
            std::nullopt,
            eps,
            negative_slope,
            pool_time,
            pool_frequency,
            halo,
            out_type,
            frames,
            out_frames};
  if (drop_mask) in.drop_mask = checked("drop_mask", *drop_mask, {B, F / pool_frequency}, x, acc);
  return in;
}

inline std::vector<int64_t> out_sizes(const NormPool& layer) {
  return {layer.batch, layer.out_time(), layer.out_frequencies(), layer.channels};
}

inline std::vector<int64_t> statistics_sizes(const NormPool& layer) {
  return {layer.batch, layer.pooled_time(), layer.pool_time, 2};
}

inline Saved check_saved(const Inputs& in, const Tensor& grad_out, const Tensor& statistics) {
  const NormPool layer = in.layer();
  return {checked("grad_out", grad_out, out_sizes(layer), in.x, in.out_type),
          checked("statistics", statistics, statistics_sizes(layer), in.x, in.acc_type())};
}

// ---- what the implementations share
inline Outputs run_forward(const Inputs& in, void (*run)(const Forward&, void*), void* stream) {
  Forward p = {in.layer()};
  const Tensor out = new_empty(in.x, out_sizes(p.layer), in.out_type),
               statistics = new_empty(in.x, statistics_sizes(p.layer), in.acc_type());
  p.out = out.mutable_data_ptr();
  p.statistics = statistics.mutable_data_ptr();
  if (p.layer.groups() > 0) run(p, stream);
  return {out, statistics};
}

inline Gradients run_backward(const Inputs& in, const Saved& saved, Needs needs,
                              int64_t (*parts)(const NormPool&),
                              void (*run)(const Backward&, void*), void* stream) {
  Backward p = {in.layer()};
  const int64_t F = p.layer.frequencies, C = p.layer.channels;
  const ScalarType acc = in.acc_type();
  const bool empty = p.layer.groups() == 0;
  const Tensor grad_x = new_empty(
      in.x,
      needs.x ? std::vector<int64_t>{in.x.size(0), in.x.size(1), F, C} : std::vector<int64_t>{0},
      in.x.scalar_type());
  p.parts = empty ? 0 : parts(p.layer);
  // Also where no gradient of a parameter is wanted, since that is rare.
  const Tensor bias_sums = new_empty(in.x, {p.parts, C}, acc),
               ln_weight_sums = new_empty(in.x, {p.parts, F, C}, acc),
               ln_bias_sums = new_empty(in.x, {p.parts, F, C}, acc);
  if (!empty) {
    p.grad_out = saved.grad_out.const_data_ptr();
    p.statistics = saved.statistics.const_data_ptr();
    p.grad_x = needs.x ? grad_x.mutable_data_ptr() : nullptr;
    p.bias_sums = bias_sums.mutable_data_ptr();
    p.ln_weight_sums = ln_weight_sums.mutable_data_ptr();
    p.ln_bias_sums = ln_bias_sums.mutable_data_ptr();
    run(p, stream);
  }
  auto total = [&](const Tensor& sums) {
    return needs.parameters ? sum_rows(sums) : new_empty(in.x, {0}, acc);
  };
  return {grad_x, total(bias_sums), total(ln_weight_sums), total(ln_bias_sums)};
}

// ---- the ops
// As the dispatcher calls them. A device's Implementation has forward(in) and
// backward(in, saved, needs).
template <class Implementation>
struct Operator {
  static Outputs forward(const Tensor& x, const Tensor& bias, const Tensor& ln_weight,
                         const Tensor& ln_bias, OptionalTensor drop_mask, double eps,
                         double negative_slope, int64_t pool_time, int64_t pool_frequency,
                         bool halo, std::string out_dtype, int64_t frames, int64_t out_frames) {
    return Implementation::forward(check_inputs(x, bias, ln_weight, ln_bias, std::move(drop_mask),
                                                eps, negative_slope, pool_time, pool_frequency,
                                                halo, out_dtype, frames, out_frames));
  }

  static Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& bias,
                            const Tensor& ln_weight, const Tensor& ln_bias,
                            OptionalTensor drop_mask, double eps, double negative_slope,
                            int64_t pool_time, int64_t pool_frequency, bool halo,
                            std::string out_dtype, int64_t frames, int64_t out_frames,
                            const Tensor& statistics, bool need_x, bool need_parameters) {
    const Inputs in =
        check_inputs(x, bias, ln_weight, ln_bias, std::move(drop_mask), eps, negative_slope,
                     pool_time, pool_frequency, halo, out_dtype, frames, out_frames);
    return Implementation::backward(in, check_saved(in, grad_out, statistics),
                                    Needs{need_x, need_parameters});
  }
};

}  // namespace sb_fast_sligru::norm_pool
