// Both passes over the sequence, written once for every backend that issues the recurrent product
// step by step. A backend is a class `Steps`: the element kernels of recurrence.h and U as its
// products read it (CpuSteps in operator.cpp, CudaSteps in operator_cuda.cpp). Included by exactly
// those two files: the only ones that see tensors.
//
// Memory: the forward keeps h and rho; the backward recomputes U h_{t-1} with one product per chunk
// of time, so its temporaries stay near Steps::kChunkBytes whatever T is.
#pragma once

#include "light_gru/operator.h"

namespace sb_fast_sligru {

template <class Steps>
Outputs forward_sweep(const Inputs& in, const Steps& steps) {
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  const ScalarType acc = in.acc_type();
  Tensor h = new_empty(in.wx, {in.batch(), T, in.directions() * H}, in.u.scalar_type());
  Tensor rho = new_empty(in.wx, {in.layer_norm ? R : 0, T}, acc);
  if (R == 0 || T == 0) return {h, rho};

  const Tensor uc = steps.recurrent_operand(in);
  Tensor state = in.h0 ? torch::stable::clone(*in.h0) : new_zeros(in.wx, {R, H}, acc);
  const Tensor operand = in.operand_type == acc ? state : torch::stable::to(state, in.operand_type);

  // r = operand Uc^T, or its transpose.
  const Tensor uc_t = torch::stable::transpose(uc, 0, 1),
               operand_t = torch::stable::transpose(operand, 0, 1);
  const bool transposed = steps.writes_transposed(in);
  const Tensor r =
      transposed ? new_empty(in.wx, {2 * H, R}, acc) : new_empty(in.wx, {R, 2 * H}, acc);
  ForwardStep p = {};
  p.layer = in.recurrence();
  p.r = r.const_data_ptr();
  p.r_row_stride = transposed ? 1 : 2 * H;
  p.r_unit_stride = transposed ? R : 1;
  p.state = state.mutable_data_ptr();
  p.operand = operand.mutable_data_ptr();
  p.h = h.mutable_data_ptr();
  p.rho = rho.mutable_data_ptr();
  for (int64_t n = 0; n < T; ++n) {
    if (transposed) {
      multiply(uc, operand_t, r);
    } else {
      steps.product(operand, uc_t, r);
    }
    steps.forward_step(p, n);
  }
  return {h, rho};
}

template <class Steps>
Gradients backward_sweep(const Inputs& in, const Saved& saved, Needs needs, const Steps& steps) {
  const int64_t B = in.batch(), R = in.rows(), T = in.time(), H = in.hidden();
  const ScalarType acc = in.acc_type();
  const bool need_ln = needs.ln && in.layer_norm;
  const Tensor grad_h = with_unit_last_stride(saved.grad_h);
  const Tensor &h = saved.h, &rho = saved.rho;
  auto sizes_if = [](bool wanted, std::vector<int64_t> sizes) {
    return wanted ? sizes : std::vector<int64_t>{0};
  };

  const Tensor uc = steps.recurrent_operand(in), uc_t = torch::stable::transpose(uc, 0, 1);
  Tensor grad_wx = new_empty(in.wx, sizes_if(needs.wx, {B, T, 2 * H}), in.wx.scalar_type());
  Tensor grad_u = new_zeros(in.wx, sizes_if(needs.u, {2 * H, H}), acc);
  Tensor grad_ln_weight = new_zeros(in.wx, sizes_if(need_ln, {R, 2 * H}), acc);
  Tensor grad_ln_bias = new_zeros(in.wx, sizes_if(need_ln, {R, 2 * H}), acc);
  Tensor grad_h0 = new_zeros(in.wx, sizes_if(needs.h0, {R, H}), acc);

  if (R > 0 && T > 0) {
    const int64_t step_elements = R * (H + 2 * H + 2 * H);  // h_{t-1}, r and e
    const int64_t element_bytes = acc == ScalarType::Double ? 8 : 4;
    const int64_t chunk =
        std::clamp<int64_t>(Steps::kChunkBytes / (element_bytes * step_elements), 1, T);
    Tensor previous = new_empty(in.wx, {chunk * R, H}, in.operand_type);
    Tensor r = new_empty(in.wx, {chunk * R, 2 * H}, acc);
    Tensor e = new_empty(in.wx, {chunk * R, 2 * H}, in.operand_type);
    const Tensor base = new_zeros(in.wx, {R, H}, acc), product = new_zeros(in.wx, {R, H}, acc);
    // One view per step of a chunk, made once: the loop over time then allocates nothing.
    std::vector<Tensor> e_of, r_of, previous_of;
    for (int64_t i = 0; i < chunk; ++i) {
      e_of.push_back(torch::stable::narrow(e, 0, i * R, R));
      r_of.push_back(torch::stable::narrow(r, 0, i * R, R));
      previous_of.push_back(torch::stable::narrow(previous, 0, i * R, R));
    }

    BackwardStep p = {};
    p.layer = in.recurrence();
    p.grad_h = grad_h.const_data_ptr();
    p.grad_h_batch_stride = grad_h.stride(0);
    p.grad_h_time_stride = grad_h.stride(1);
    p.h = h.const_data_ptr();
    p.rho = rho.const_data_ptr();
    p.base = base.mutable_data_ptr();
    p.product = product.const_data_ptr();
    p.grad_wx = needs.wx ? grad_wx.mutable_data_ptr() : nullptr;
    p.grad_ln_weight = need_ln ? grad_ln_weight.mutable_data_ptr() : nullptr;
    p.grad_ln_bias = need_ln ? grad_ln_bias.mutable_data_ptr() : nullptr;
    p.last_row = R;
    for (int64_t end = T; end > 0; end -= chunk) {
      const int64_t begin = std::max<int64_t>(end - chunk, 0), length = end - begin;
      GatherPrevious gather = {};
      gather.layer = p.layer;
      gather.h = p.h;
      gather.first_step = begin;
      gather.steps = length;
      gather.previous = previous.mutable_data_ptr();
      steps.gather_previous(gather);
      const Tensor previous_chunk = torch::stable::narrow(previous, 0, 0, length * R);
      Tensor r_chunk = torch::stable::narrow(r, 0, 0, length * R),
             e_chunk = torch::stable::narrow(e, 0, 0, length * R);
      multiply(previous_chunk, uc_t, r_chunk);
      for (int64_t n = end - 1; n >= begin; --n) {
        p.r = r_of[n - begin].const_data_ptr();
        p.e = e_of[n - begin].mutable_data_ptr();
        p.scaled = needs.u ? previous_of[n - begin].mutable_data_ptr() : nullptr;
        if (in.bidirectional && 2 * n + 1 == T) {
          // Both directions meet at this time: the second adds to the grad_wx that the first wrote.
          p.last_row = B;
          steps.backward_step(p, n);
          p.first_row = B;
          p.last_row = R;
          steps.backward_step(p, n);
          p.first_row = 0;
        } else {
          steps.backward_step(p, n);
        }
        if (n > 0 || needs.h0) multiply(e_of[n - begin], uc, product);
      }
      if (needs.u) {
        const Tensor part = new_empty(in.wx, {2 * H, H}, acc);
        multiply(torch::stable::transpose(e_chunk, 0, 1), previous_chunk, part);
        grad_u = torch::stable::subtract(grad_u, part, -1.0);
      }
    }
    if (needs.h0) {
      FinishCarry finish = {};
      finish.layer = p.layer;
      finish.rho = p.rho;
      finish.base = p.base;
      finish.product = p.product;
      finish.grad_h0 = grad_h0.mutable_data_ptr();
      steps.finish_carry(finish);
    }
  }
  if (needs.u) {
    if (in.layer_norm) grad_u = subtract_column_mean(grad_u);
    grad_u = torch::stable::to(grad_u, in.u.scalar_type());
  }
  if (need_ln) {
    grad_ln_weight = sum_rows(grad_ln_weight);
    grad_ln_bias = sum_rows(grad_ln_bias);
  }
  return {grad_wx, grad_u, grad_h0, grad_ln_weight, grad_ln_bias};
}

}  // namespace sb_fast_sligru
