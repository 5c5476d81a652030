// Both passes over the sequence with the persistent kernels: memory, and the products around them.
// What each kernel reads and writes is in persistent.h. Included by operator_cuda.cpp alone.
#pragma once

#include "light_gru/operand.h"
#include "light_gru/operator.h"
#include "light_gru/persistent/persistent.h"
#include "light_gru/places.h"

namespace sb_fast_sligru {

inline Inputs aligned(Inputs in) {
  in.wx = aligned(in.wx);
  in.u = aligned(in.u);
  for (OptionalTensor* t : {&in.h0, &in.drop_mask, &in.ln_weight, &in.ln_bias})
    if (t->has_value()) *t = aligned(**t);
  return in;
}

// U as the sequential kernels read it; `pack` is called where that is not as it is.
template <class Pack>
Tensor kernel_operand(Kernel kernel, const Tensor& u, Pack pack) {
  const int64_t bytes = packed_bytes(kernel);
  if (bytes == 0) return u;
  const Tensor packed = new_empty(u, {bytes}, ScalarType::Byte);
  check_launch(pack(u.const_data_ptr<float>(), packed.mutable_data_ptr()));
  return packed;
}

// Memory for the messages of a pass.
inline Tensor exchange_memory(const Inputs& in, const KernelChoice& choice, Direction direction) {
  return new_empty(in.wx, {exchange_bytes(choice, in.recurrence(), direction)}, ScalarType::Byte);
}

inline Outputs persistent_forward(const Inputs& in, const KernelChoice& choice,
                                  cudaStream_t stream) {
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  const Places places(in, stream);
  Tensor h = places.new_frames(in, in.directions() * H, in.u.scalar_type());
  Tensor rho = in.new_rho();
  if (R == 0 || T == 0) return {h, rho};
  const Tensor u = kernel_operand(
      choice.kernel, recurrent_operand(in, stream),
      [&](const float* centred, void* packed) { return pack_forward(centred, packed, H, stream); });
  const Tensor exchange = exchange_memory(in, choice, Direction::kForward);
  PersistentForward p = {};
  p.layer = places.layer();
  p.u = u.const_data_ptr();
  p.h = h.mutable_data_ptr();
  p.rho = in.layer_norm ? rho.mutable_data_ptr<float>() : nullptr;
  p.exchange = exchange.mutable_data_ptr();
  p.choice = choice;
  check_launch(run_forward(p, stream));
  return {h, rho};
}

// [Uc; Uc^T Uc]: one product with h_{t-1} then gives r and what removes the mean of dy xh from the
// carry (backward_narrow.cu). Without a LayerNorm the latter is not needed.
inline Tensor projection_operand(const Inputs& in, const Tensor& u) {
  if (!in.layer_norm) return u;
  const int64_t H = in.hidden();
  const Tensor gram = new_empty(u, {H, H}, ScalarType::Float);
  multiply(torch::stable::transpose(u, 0, 1), u, gram);
  Tensor both = new_empty(u, {3 * H, H}, in.operand_type);
  Tensor upper = torch::stable::narrow(both, 0, 0, 2 * H);
  Tensor lower = torch::stable::narrow(both, 0, 2 * H, H);
  torch::stable::copy_(upper, u);
  torch::stable::copy_(lower, gram);
  return both;
}

inline Gradients persistent_backward(const Inputs& in, const Saved& saved, Needs needs,
                                     const KernelChoice& choice, cudaStream_t stream) {
  // A launch of the sequential kernel costs about as much as 20 steps, once for every wave of its
  // clusters: chunks of at least kChunkSteps, unless those need more than kMostBytes.
  constexpr int64_t kChunkBytes = int64_t{224} << 20, kMostBytes = int64_t{1} << 30;
  constexpr int64_t kChunkSteps = 400;
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  const bool ln = in.layer_norm, need_ln = needs.ln && ln;
  const Tensor &h = saved.h, &rho = saved.rho;
  const ScalarType fp32 = ScalarType::Float;
  auto nothing = [&] { return new_empty(in.wx, {0}, fp32); };
  const Places places(in, stream);
  Tensor grad_wx = places.new_frames(in, 2 * H, in.wx.scalar_type());
  Tensor grad_h0 = new_zeros(in.wx, {R, H}, fp32);
  // Sums over the chunks; the first chunk's part is the first sum.
  const bool empty = R == 0 || T == 0;
  Tensor grad_u = needs.u && empty ? new_zeros(in.wx, {2 * H, H}, fp32) : nothing();
  Tensor grad_ln = need_ln && empty ? new_zeros(in.wx, {4 * H}, fp32) : nothing();

  if (!empty) {
    const Tensor grad_h = aligned(saved.grad_h), u = recurrent_operand(in, stream);
    const Tensor w_t = torch::stable::transpose(projection_operand(in, u), 0, 1);
    const auto* ln_weight = static_cast<const float*>(pointer(in.ln_weight));
    const Tensor kernel_u =
        kernel_operand(choice.kernel, u, [&](const float* centred, void* packed) {
          return pack_backward(centred, ln_weight, packed, H, stream);
        });
    const int64_t width = w_t.size(1), padded = choice.padded_hidden();
    const int64_t streams = coefficient_streams(ln);
    const int64_t operand_bytes = in.operand_type == fp32 ? 4 : 2;
    const int64_t bytes_per_step =
        R * (4 * width + operand_bytes * (H + streams * padded + 2 * padded));
    const int64_t bytes =
        std::clamp<int64_t>(kChunkSteps * bytes_per_step, kChunkBytes, kMostBytes);
    const int64_t chunk = std::clamp<int64_t>(bytes / bytes_per_step, 1, T);

    // The kernels see dense arrays of the chunk's own length, so the shorter chunk takes a front
    // part.
    auto buffer = [&](int64_t elements, ScalarType type) {
      return new_empty(in.wx, {elements}, type);
    };
    const Tensor h_previous = buffer(R * chunk * H, in.operand_type);
    const Tensor projection = buffer(R * chunk * width, fp32);
    const Tensor coefficients = buffer(R * chunk * streams * padded, in.operand_type);
    const Tensor dwx_rows = buffer(R * chunk * 2 * padded, in.operand_type);
    const Tensor& dr = coefficients;  // written when those have been read, and smaller
    const Tensor m2 = ln ? buffer(R * chunk, fp32) : nothing();
    const Tensor affine = need_ln ? buffer(affine_partials(R, chunk) * 4 * H, fp32) : nothing();
    const Tensor exchange = exchange_memory(in, choice, Direction::kBackward);
    auto front = [](Tensor t, int64_t rows, int64_t columns) {
      std::vector<int64_t> sizes{rows, columns};
      return torch::stable::view(torch::stable::narrow(t, 0, 0, rows * columns), sizes);
    };

    PersistentBackward p = {};
    p.layer = places.layer();
    p.u = kernel_u.const_data_ptr();
    p.h = h.const_data_ptr();
    p.rho = ln ? rho.const_data_ptr<float>() : nullptr;
    p.grad_h = grad_h.const_data_ptr();
    p.grad_h_batch_stride = in.packed() ? 0 : grad_h.stride(0);
    p.grad_h_time_stride = grad_h.stride(grad_h.dim() - 2);
    p.dwx = grad_wx.mutable_data_ptr();
    p.carry = grad_h0.mutable_data_ptr<float>();
    p.h_previous = h_previous.mutable_data_ptr();
    p.projection = projection.mutable_data_ptr<float>();
    p.coefficients = coefficients.mutable_data_ptr();
    p.dwx_rows = dwx_rows.mutable_data_ptr();
    p.m2 = ln ? m2.mutable_data_ptr<float>() : nullptr;
    p.dr = dr.mutable_data_ptr();
    p.affine_partial = need_ln ? affine.mutable_data_ptr<float>() : nullptr;
    p.exchange = exchange.mutable_data_ptr();
    p.choice = choice;
    for (int64_t end = T; end > 0; end -= chunk) {
      const int64_t begin = std::max<int64_t>(end - chunk, 0), count = end - begin, n = R * count;
      const auto add = [&](Tensor& sum, const Tensor& part) {
        sum = end == T ? part : torch::stable::subtract(sum, part, -1.0);
      };
      p.first = begin;
      p.count = count;
      check_launch(gather_h_previous(p, stream));
      multiply(front(h_previous, n, H), w_t, front(projection, n, width));
      check_launch(prepare_backward(p, stream));
      check_launch(run_backward(p, stream));
      check_launch(finish_backward(p, stream));
      if (needs.u) {
        const Tensor part = new_empty(in.wx, {2 * H, H}, fp32);
        multiply(torch::stable::transpose(front(dr, n, 2 * H), 0, 1), front(h_previous, n, H),
                 part);
        add(grad_u, part);
      }
      if (need_ln) {
        add(grad_ln, sum_rows(front(affine, affine_partials(R, count), 4 * H)));
      }
    }
  }
  if (needs.u) {
    const ScalarType type = in.u.scalar_type();
    grad_u = ln ? centred(grad_u, type, stream) : torch::stable::to(grad_u, type);
  }
  // Copies, so that the two gradients share no memory.
  auto half = [&](int64_t begin) {
    return need_ln ? torch::stable::clone(torch::stable::narrow(grad_ln, 0, begin, 2 * H))
                   : nothing();
  };
  return {needs.wx ? grad_wx : new_empty(in.wx, {0}, in.wx.scalar_type()), grad_u,
          needs.h0 ? grad_h0 : nothing(), half(0), half(2 * H)};
}

}  // namespace sb_fast_sligru
