// Both passes over the sequence, written once for every backend that issues the recurrent product
// step by step. A backend is a class `Steps`: the element kernels of recurrence.h, U as its products
// read it, and which rows take part in a step (CpuSteps in operator.cpp, CudaSteps in
// operator_cuda.cpp). Included by exactly those two files: the only ones that see tensors.
//
// Memory: the forward keeps h and rho; the backward recomputes U h_{t-1} with one product per chunk
// of time, so its temporaries stay near Steps::kChunkBytes whatever T is.
#pragma once

#include "light_gru/operator.h"

namespace sb_fast_sligru {

// A view that a loop over time remakes only when the number of rows changes.
template <class View>
class ViewOfRows {
 public:
  explicit ViewOfRows(View view) : view_(std::move(view)) {}

  const Tensor& operator()(int64_t rows) {
    if (rows != rows_) tensor_ = view_(rows_ = rows);
    return tensor_;
  }

 private:
  View view_;
  Tensor tensor_;
  int64_t rows_ = -1;
};

template <class Steps>
Outputs forward_sweep(const Inputs& in, const Steps& steps) {
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  const ScalarType acc = in.acc_type();
  Tensor h = steps.new_frames(in, in.directions() * H, in.u.scalar_type());
  Tensor rho = in.new_rho();
  if (R == 0 || T == 0) return {h, rho};

  const Tensor uc = steps.recurrent_operand(in);
  Tensor state = new_empty(in.wx, {R, H}, acc);
  GatherPrevious initial = {};
  initial.layer = steps.layer(in);
  initial.layer.operand_type = dtype_of(acc);
  initial.steps = 1;
  initial.rows = R;
  initial.previous = state.mutable_data_ptr();
  steps.gather_previous(initial);
  Tensor operand = in.operand_type == acc ? state : torch::stable::to(state, in.operand_type);

  // r = operand Uc^T, or its transpose.
  const Tensor uc_t = torch::stable::transpose(uc, 0, 1);
  Tensor r = new_empty(in.wx, {R * 2 * H}, acc);
  ViewOfRows operand_of([&](int64_t rows) {
    const Tensor active = torch::stable::narrow(operand, 0, 0, rows);
    return steps.writes_transposed(in, rows) ? torch::stable::transpose(active, 0, 1) : active;
  });
  ViewOfRows r_of([&](int64_t rows) {
    const std::vector<int64_t> sizes =
        steps.writes_transposed(in, rows) ? std::vector{2 * H, rows} : std::vector{rows, 2 * H};
    return torch::stable::view(torch::stable::narrow(r, 0, 0, rows * 2 * H), sizes);
  });
  ForwardStep p = {};
  p.layer = steps.layer(in);
  p.r = r.const_data_ptr();
  p.state = state.mutable_data_ptr();
  p.operand = operand.mutable_data_ptr();
  p.h = h.mutable_data_ptr();
  p.rho = rho.mutable_data_ptr();
  for (int64_t n = 0; n < T && steps.active_rows(n) > 0; ++n) {
    p.rows = steps.active_rows(n);
    const bool transposed = steps.writes_transposed(in, p.rows);
    p.r_row_stride = transposed ? 1 : 2 * H;
    p.r_unit_stride = transposed ? p.rows : 1;
    if (transposed) {
      multiply(uc, operand_of(p.rows), r_of(p.rows));
    } else {
      steps.product(operand_of(p.rows), uc_t, r_of(p.rows));
    }
    steps.forward_step(p, n);
  }
  return {h, rho};
}

template <class Steps>
Gradients backward_sweep(const Inputs& in, const Saved& saved, Needs needs, const Steps& steps) {
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  const ScalarType acc = in.acc_type();
  const bool need_ln = needs.ln && in.layer_norm;
  const Tensor grad_h = with_unit_last_stride(saved.grad_h);
  const Tensor &h = saved.h, &rho = saved.rho;
  auto sizes_if = [](bool wanted, std::vector<int64_t> sizes) {
    return wanted ? sizes : std::vector<int64_t>{0};
  };

  const Tensor uc = steps.recurrent_operand(in), uc_t = torch::stable::transpose(uc, 0, 1);
  Tensor grad_wx = needs.wx ? steps.new_frames(in, 2 * H, in.wx.scalar_type())
                            : new_empty(in.wx, {0}, in.wx.scalar_type());
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
    const Tensor base = new_zeros(in.wx, {R, H}, acc);
    Tensor product = new_zeros(in.wx, {R, H}, acc);
    ViewOfRows product_of([&](int64_t rows) { return torch::stable::narrow(product, 0, 0, rows); });
    // The active rows of a chunk's steps lie one after the other: those of its step i from row
    // first_of[i] on. Where their number is always the same, so are the views.
    std::vector<int64_t> first_of(chunk + 1);
    std::vector<Tensor> e_of, r_of, previous_of;
    auto lay_out = [&](int64_t begin, int64_t length) {
      e_of.clear(), r_of.clear(), previous_of.clear();
      for (int64_t i = 0; i < length; ++i) {
        const int64_t rows = steps.active_rows(begin + i);
        first_of[i + 1] = first_of[i] + rows;
        e_of.push_back(torch::stable::narrow(e, 0, first_of[i], rows));
        r_of.push_back(torch::stable::narrow(r, 0, first_of[i], rows));
        previous_of.push_back(torch::stable::narrow(previous, 0, first_of[i], rows));
      }
    };

    BackwardStep p = {};
    p.layer = steps.layer(in);
    p.grad_h = grad_h.const_data_ptr();
    p.grad_h_batch_stride = in.packed() ? 0 : grad_h.stride(0);
    p.grad_h_time_stride = grad_h.stride(grad_h.dim() - 2);
    p.h = h.const_data_ptr();
    p.rho = rho.const_data_ptr();
    p.base = base.mutable_data_ptr();
    p.product = product.const_data_ptr();
    p.grad_wx = needs.wx ? grad_wx.mutable_data_ptr() : nullptr;
    p.grad_ln_weight = need_ln ? grad_ln_weight.mutable_data_ptr() : nullptr;
    p.grad_ln_bias = need_ln ? grad_ln_bias.mutable_data_ptr() : nullptr;
    int64_t last = T;  // of the steps that any row takes
    while (last > 0 && steps.active_rows(last - 1) == 0) --last;
    for (int64_t end = last; end > 0; end -= chunk) {
      const int64_t begin = std::max<int64_t>(end - chunk, 0), length = end - begin;
      if (in.lengths || e_of.empty()) lay_out(begin, std::min(chunk, end));
      GatherPrevious gather = {};
      gather.layer = p.layer;
      gather.h = p.h;
      for (int64_t n = begin; n < end; n += gather.steps) {  // by runs of steps with as many rows
        gather.first_step = n;
        gather.rows = steps.active_rows(n);
        gather.steps = 1;
        while (n + gather.steps < end && steps.active_rows(n + gather.steps) == gather.rows)
          ++gather.steps;
        gather.previous = previous_of[n - begin].mutable_data_ptr();
        steps.gather_previous(gather);
      }
      const int64_t rows = first_of[length];
      const Tensor previous_chunk = torch::stable::narrow(previous, 0, 0, rows);
      Tensor r_chunk = torch::stable::narrow(r, 0, 0, rows),
             e_chunk = torch::stable::narrow(e, 0, 0, rows);
      multiply(previous_chunk, uc_t, r_chunk);
      for (int64_t n = end - 1; n >= begin; --n) {
        p.rows = steps.active_rows(n);
        p.r = r_of[n - begin].const_data_ptr();
        p.e = e_of[n - begin].mutable_data_ptr();
        p.scaled = needs.u ? previous_of[n - begin].mutable_data_ptr() : nullptr;
        p.direction = BackwardStep::kBothDirections;
        if (in.bidirectional && steps.directions_meet(in, n)) {
          // At this time the second direction adds to the grad_wx that the first wrote.
          p.direction = 0;
          steps.backward_step(p, n);
          p.direction = 1;
        }
        steps.backward_step(p, n);
        if (n > 0 || needs.h0) multiply(e_of[n - begin], uc, product_of(p.rows));
      }
      if (needs.u) {
        const Tensor part = new_empty(in.wx, {2 * H, H}, acc);
        multiply(torch::stable::transpose(e_chunk, 0, 1), previous_chunk, part);
        grad_u = torch::stable::subtract(grad_u, part, -1.0);
      }
    }
    if (needs.h0) {
      FinishCarry finish = {};
      finish.layer = p.layer;  // with its order
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
