// Library _C, operator attention_decoder: its schemas and its CPU implementation. Built against
// torch's stable ABI, as light_gru/operator.cpp is.
//
//   attention_decoder           -> h [B, N, H], context [B, N, C], attention [B, N, L], of u's dtype
//   attention_decoder_backward  -> gradients; empty where need_* is false
//   attention_decoder_obstacle  -> what keeps the persistent kernels from a call, "" if nothing does
//
// decoder.h has the mathematics and the axes.
#include "attention_decoder/operator.h"

#include "attention_decoder/choice.h"
#include "attention_decoder/sweep.h"
#include "common/cpu_product.h"

namespace sb_fast_sligru::attention_decoder {
namespace {

struct CpuSteps {
  void cell(const ForwardStep& p, int64_t t) const { cpu::cell(p, t); }
  void energies(const ForwardStep& p, int64_t t) const { cpu::energies(p, t); }
  void attend(const ForwardStep& p, int64_t t) const { cpu::attend(p, t); }
  void finish_context(const ForwardStep& p, int64_t t) const { cpu::finish_context(p, t); }
  void gather_previous(const GatherPrevious& p) const { cpu::gather_previous(p); }
  void backward_context(const BackwardStep& p, int64_t t) const { cpu::backward_context(p, t); }
  void backward_attention(const BackwardStep& p, int64_t t) const { cpu::backward_attention(p, t); }
  void backward_energies(const BackwardStep& p, int64_t t) const { cpu::backward_energies(p, t); }
  void backward_query(const BackwardStep& p, int64_t t) const { cpu::backward_query(p, t); }
  void backward_cell(const BackwardStep& p, int64_t t) const { cpu::backward_cell(p, t); }
  // Rows of b have unit stride.
  Tensor operand(const Tensor& b) const { return torch::stable::contiguous(b); }
  void multiply(const Tensor& a, const Tensor& b, const Tensor& out) const {
    const bool batches = a.dim() == 3;
    const int64_t row = a.dim() - 2, column = row + 1;
    sb_fast_sligru::cpu::Product p = {};
    p.type = dtype_of(out.scalar_type());
    p.batches = batches ? a.size(0) : 1;
    p.rows = a.size(row);
    p.columns = b.size(column);
    p.depth = a.size(column);
    p.x = a.const_data_ptr();
    p.x_batch = batches ? a.stride(0) : 0;
    p.x_row = a.stride(row);
    p.x_depth = a.stride(column);
    p.w = b.const_data_ptr();
    p.w_batch = batches ? b.stride(0) : 0;
    p.w_depth = b.stride(row);
    p.out = out.mutable_data_ptr();
    p.out_batch = batches ? out.stride(0) : 0;
    p.out_row = out.stride(row);
    sb_fast_sligru::cpu::multiply(p);
  }
  void sum_rows(const Tensor& rows, const Tensor& sums) const {
    cpu::sum_rows(dtype_of(rows.scalar_type()), rows.const_data_ptr(), rows.size(0), rows.size(1),
                  sums.mutable_data_ptr());
  }
};

void check_lengths(const Inputs& in) {
  const int64_t* lengths = static_cast<const int64_t*>(in.lengths.const_data_ptr());
  for (int64_t row = 0; row < in.batch(); ++row)
    STD_TORCH_CHECK(lengths[row] >= 0 && lengths[row] <= in.frames(), "lengths: got ", lengths[row],
                    " in row ", row, ", expected 0 to L = ", in.frames());
}

// The CPU computes 16-bit problems in float32 throughout.
Inputs widen(Inputs in) {
  const ScalarType acc = accumulation_type(in.type());
  in.operand_type = acc;
  for (Tensor* t : {&in.wx, &in.keys, &in.values, &in.w_context, &in.u, &in.w_query, &in.filters,
                    &in.w_location, &in.v, &in.w_out, &in.b_out})
    *t = torch::stable::to(*t, acc);
  for (OptionalTensor* t : {&in.context_mask, &in.u_bias})
    if (t->has_value()) *t = torch::stable::to(**t, acc);
  return in;
}

Saved widen(Saved saved, ScalarType acc) {
  for (Tensor* t : {&saved.h, &saved.context, &saved.attention}) *t = torch::stable::to(*t, acc);
  for (OptionalTensor* t : {&saved.grad_h, &saved.grad_context, &saved.grad_attention})
    if (t->has_value()) *t = torch::stable::to(**t, acc);
  return saved;
}

struct Cpu {
  static void check(const std::string& backend, const Inputs& in) {
    STD_TORCH_CHECK(backend == "cpu", "backend: got \"", backend,
                    "\", expected \"cpu\" for tensors on the CPU");
    check_lengths(in);
  }

  static Outputs forward(const std::string& backend, const Inputs& in) {
    check(backend, in);
    const auto [h, context, attention] = forward_sweep(widen(in), CpuSteps{});
    return {torch::stable::to(h, in.type()), torch::stable::to(context, in.type()),
            torch::stable::to(attention, in.type())};
  }

  static Gradients backward(const std::string& backend, const Inputs& in, const Saved& saved,
                            Needs needs) {
    check(backend, in);
    const auto [wx, keys, values, w_context, u, u_bias, w_query, filters, w_location, v, w_out,
                b_out] =
        backward_sweep(widen(in), widen(saved, accumulation_type(in.type())), needs, CpuSteps{});
    auto weight = [&](const Tensor& t) { return torch::stable::to(t, in.type()); };
    return {torch::stable::to(wx, in.wx.scalar_type()),
            torch::stable::to(keys, in.keys.scalar_type()),
            torch::stable::to(values, in.values.scalar_type()),
            weight(w_context),
            weight(u),
            weight(u_bias),
            weight(w_query),
            weight(filters),
            weight(w_location),
            weight(v),
            weight(w_out),
            weight(b_out)};
  }
};

std::string obstacle(bool has_tensor_code, ScalarType operand_dtype, int64_t channels,
                     int64_t taps) {
  return persistent_obstacle(has_tensor_code, dtype_of(operand_dtype), channels, taps);
}

}  // namespace
}  // namespace sb_fast_sligru::attention_decoder

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "attention_decoder(Tensor wx, Tensor keys, Tensor values, Tensor lengths, "
      "Tensor? context_mask, Tensor w_context, Tensor u, Tensor? u_bias, Tensor w_query, "
      "Tensor filters, Tensor w_location, Tensor v, Tensor w_out, Tensor b_out, float scaling, "
      "str operand_dtype, str backend) -> (Tensor h, Tensor context, Tensor attention)");
  m.def(
      "attention_decoder_backward(Tensor? grad_h, Tensor? grad_context, Tensor? grad_attention, "
      "Tensor wx, Tensor keys, Tensor values, Tensor lengths, Tensor? context_mask, "
      "Tensor w_context, Tensor u, Tensor? u_bias, Tensor w_query, Tensor filters, "
      "Tensor w_location, Tensor v, Tensor w_out, Tensor b_out, float scaling, "
      "str operand_dtype, str backend, Tensor h, Tensor context, Tensor attention, "
      "bool need_wx, bool need_keys, bool need_values, bool need_cell, bool need_query, "
      "bool need_alignment, bool need_out) -> (Tensor grad_wx, Tensor grad_keys, "
      "Tensor grad_values, Tensor grad_w_context, Tensor grad_u, Tensor grad_u_bias, "
      "Tensor grad_w_query, Tensor grad_filters, Tensor grad_w_location, Tensor grad_v, "
      "Tensor grad_w_out, Tensor grad_b_out)");
  m.def(
      "attention_decoder_obstacle(bool has_tensor_code, ScalarType operand_dtype, int channels, "
      "int taps) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CompositeExplicitAutograd, m) {
  m.impl("attention_decoder_obstacle", TORCH_BOX(&sb_fast_sligru::attention_decoder::obstacle));
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  using sb_fast_sligru::attention_decoder::Operator;
  using Cpu = sb_fast_sligru::attention_decoder::Cpu;
  m.impl("attention_decoder", TORCH_BOX(&Operator<Cpu>::forward));
  m.impl("attention_decoder_backward", TORCH_BOX(&Operator<Cpu>::backward));
}
