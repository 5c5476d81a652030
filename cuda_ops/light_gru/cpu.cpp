// The element kernels of recurrence.h on the CPU. Rows of the batch go to threads; within a row the
// loops over the 2H gates are written so that the compiler vectorises them, for the widest vectors
// of the machine that runs them: every entry point is compiled for baseline x86-64, AVX2 and
// AVX-512 and the loader picks one.
//
// Each row is reduced by one thread in one order, so the same input gives the same bits whatever
// the thread count.
#include <vector>

#include "common/cpu_loops.h"
#include "light_gru/recurrence.h"

namespace sb_fast_sligru::cpu {
namespace {

// y = rho * r * weight + bias for one row, where the affine part may be absent.
template <class T>
SLIGRU_HD void normalise_row(const T* r, T rho, const T* weight, const T* bias, int64_t n, T* y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = r[j] * rho;
  if (weight != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] *= weight[j];
  }
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] += bias[j];
  }
}

template <class T, class Act>
SLIGRU_HD void forward_rows(const ForwardStep& p, int64_t step, int64_t begin, int64_t end) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden, D = layer.directions;
  std::vector<T> scratch(3 * H);
  T* y = scratch.data();  // [2H] normalised r, then U's part of the gates
  T* mask = y + 2 * H;    // [H]
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = layer.row_at(i), b = row % layer.batch, direction = row / layer.batch,
                  t = layer.time_of(row, step);
    const T* r = at<T>(p.r, i * p.r_row_stride);
    for (int64_t j = 0; j < 2 * H; ++j) y[j] = r[j * p.r_unit_stride];

    if (layer.layer_norm) {
      T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < 2 * H; ++j) sum += y[j];
      const T mean = sum / T(2 * H);
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < 2 * H; ++j) {
        y[j] -= mean;
        squares += y[j] * y[j];
      }
      const T rho = T(1) / std::sqrt(squares / T(2 * H) + T(layer.eps));
      at<T>(p.rho, row * layer.time)[t] = rho;
      normalise_row(y, rho, at<T>(layer.ln_weight, 0), at<T>(layer.ln_bias, 0), 2 * H, y);
    }
    const T* wx =
        at<T>(layer.wx, layer.element_of(b, t, layer.wx_batch_stride, layer.wx_time_stride));
    copy_or_fill(at<T>(layer.drop_mask, row * H), T(1), H, mask);
    T* state = at<T>(p.state, i * H);
    T* h = at<T>(p.h, (layer.frame_of(b, t) * D + direction) * H);
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      const T c = Act::value(wx[j] + y[j]) * mask[j];
      const T z = sigmoid(wx[H + j] + y[H + j]);
      state[j] = h[j] = next_hidden(state[j], z, c);
    }
  }
}

template <class T, class Act>
SLIGRU_HD void backward_rows(const BackwardStep& p, int64_t step, int64_t begin, int64_t end) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden, D = layer.directions, N = 2 * H;
  std::vector<T> scratch(N + 2 * H);
  T* y = scratch.data();   // [2H] normalised r, then U's part of the gates
  T* previous = y + N;     // [H] h_{t-1}
  T* mask = previous + H;  // [H]
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = layer.row_at(i), b = row % layer.batch, direction = row / layer.batch;
    if (p.direction != BackwardStep::kBothDirections && p.direction != direction) continue;
    const int64_t length = layer.length_of(row), t = layer.time_of(row, step);
    const int64_t towards_start = direction == 0 ? -1 : 1;  // from t to the time of h_{t-1}
    const T* r = at<T>(p.r, i * N);
    const T* rho_row = at<T>(p.rho, row * layer.time);
    const T rho = layer.layer_norm ? rho_row[t] : T(1);
    // base and product are zero before the first backward step; there is no later rho to read then.
    const T rho_next = layer.layer_norm && step < length - 1 ? rho_row[t - towards_start] : T(1);

    const T* h_previous =
        step == 0 ? at<T>(layer.h0, row * H)
                  : at<T>(p.h, (layer.frame_of(b, t + towards_start) * D + direction) * H);
    copy_or_fill(h_previous, T(0), H, previous);
    copy_or_fill(at<T>(layer.drop_mask, row * H), T(1), H, mask);
    const T* weight = at<T>(layer.ln_weight, 0);
    normalise_row(r, rho, weight, at<T>(layer.ln_bias, 0), N, y);

    const T* wx =
        at<T>(layer.wx, layer.element_of(b, t, layer.wx_batch_stride, layer.wx_time_stride));
    const T* grad_h =
        at<T>(p.grad_h,
              layer.element_of(b, t, p.grad_h_batch_stride, p.grad_h_time_stride) + direction * H);
    const T* product = at<T>(p.product, i * H);
    T* base = at<T>(p.base, i * H);
    T* e = at<T>(p.e, i * N);
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      const T d = grad_h[j] + base[j] + rho_next * product[j];
      const T a = wx[j] + y[j], z = sigmoid(wx[H + j] + y[H + j]);
      const CellGradient<T> g =
          cell_gradient(d, previous[j], Act::value(a), Act::gradient(a), z, mask[j]);
      e[j] = g.candidate;
      e[H + j] = g.gate;
      base[j] = g.direct;
    }

    if (p.grad_wx != nullptr) {
      T* grad_wx = at<T>(p.grad_wx, layer.frame_of(b, t) * N);
      // Two directions share wx: whichever comes to this time second adds to what the first wrote.
      const bool second = D == 2 && (direction == 0 ? t < length - 1 - t : t >= length - 1 - t);
      if (second) {
#pragma omp simd
        for (int64_t j = 0; j < N; ++j) grad_wx[j] += e[j];
      } else {
        std::copy(e, e + N, grad_wx);
      }
    }
    if (layer.layer_norm) {
      T* grad_weight = at<T>(p.grad_ln_weight, row * N);
      if (grad_weight != nullptr) {
        T* grad_bias = at<T>(p.grad_ln_bias, row * N);
#pragma omp simd
        for (int64_t j = 0; j < N; ++j) {
          grad_weight[j] += e[j] * (r[j] * rho);
          grad_bias[j] += e[j];
        }
      }
      if (weight != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < N; ++j) e[j] *= weight[j];
      }
      // dr = rho (e - xh mean(e xh)), xh = rho r; mean(e) drops out because Uc is centred. rho is
      // applied later.
      T dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < N; ++j) dot += e[j] * r[j];
      const T factor = dot * rho / T(N) * rho;
#pragma omp simd
      for (int64_t j = 0; j < N; ++j) e[j] -= factor * r[j];
    }
    if (p.scaled != nullptr) {
      T* scaled = at<T>(p.scaled, i * H);
#pragma omp simd
      for (int64_t j = 0; j < H; ++j) scaled[j] = rho * previous[j];
    }
  }
}

// One vectorised entry point a pass and type: the run-time activation becomes a template argument
// inside it, so that everything below is inlined into, and compiled for, each clone.
template <class T>
SLIGRU_HD void forward_range(const ForwardStep& p, int64_t step, int64_t begin, int64_t end) {
  with_activation(p.layer.activation, [&](auto act) ALWAYS_INLINE {
    forward_rows<T, decltype(act)>(p, step, begin, end);
  });
}

template <class T>
SLIGRU_HD void backward_range(const BackwardStep& p, int64_t step, int64_t begin, int64_t end) {
  with_activation(p.layer.activation, [&](auto act) ALWAYS_INLINE {
    backward_rows<T, decltype(act)>(p, step, begin, end);
  });
}

VECTOR_CLONES
void forward_rows_float(const ForwardStep& p, int64_t step, int64_t begin, int64_t end) {
  forward_range<float>(p, step, begin, end);
}

VECTOR_CLONES
void forward_rows_double(const ForwardStep& p, int64_t step, int64_t begin, int64_t end) {
  forward_range<double>(p, step, begin, end);
}

VECTOR_CLONES
void backward_rows_float(const BackwardStep& p, int64_t step, int64_t begin, int64_t end) {
  backward_range<float>(p, step, begin, end);
}

VECTOR_CLONES
void backward_rows_double(const BackwardStep& p, int64_t step, int64_t begin, int64_t end) {
  backward_range<double>(p, step, begin, end);
}

template <class T>
void gather_steps(const GatherPrevious& p) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden;
  for_rows(0, p.steps * p.rows, H, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t step = p.first_step + i / p.rows, row = layer.row_at(i % p.rows);
      const T* from = at<T>(layer.h0, row * H);
      if (step > 0) {
        const int64_t t = layer.time_of(row, step - 1);
        from = at<T>(
            p.h, (layer.frame_of(row % layer.batch, t) * layer.directions + row / layer.batch) * H);
      }
      copy_or_fill(from, T(0), H, at<T>(p.previous, i * H));
    }
  });
}

template <class T>
void finish_rows(const FinishCarry& p) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden;
  for_rows(0, layer.rows(), H, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = layer.row_at(i);
      if (layer.length_of(row) == 0) continue;  // h0 has no result to change
      const T rho = layer.layer_norm ? at<T>(p.rho, row * layer.time)[layer.time_of(row, 0)] : T(1);
      const T* base = at<T>(p.base, i * H);
      const T* product = at<T>(p.product, i * H);
      T* grad_h0 = at<T>(p.grad_h0, row * H);
      for (int64_t j = 0; j < H; ++j) grad_h0[j] = base[j] + rho * product[j];
    }
  });
}

}  // namespace

void forward_step(const ForwardStep& p, int64_t step) {
  const auto rows =
      p.layer.output_type == DType::kFloat64 ? forward_rows_double : forward_rows_float;
  for_rows(0, p.rows, 2 * p.layer.hidden,
           [&](int64_t begin, int64_t end) { rows(p, step, begin, end); });
}

void gather_previous(const GatherPrevious& p) {
  p.layer.output_type == DType::kFloat64 ? gather_steps<double>(p) : gather_steps<float>(p);
}

void backward_step(const BackwardStep& p, int64_t step) {
  const auto rows =
      p.layer.output_type == DType::kFloat64 ? backward_rows_double : backward_rows_float;
  for_rows(0, p.rows, 2 * p.layer.hidden,
           [&](int64_t begin, int64_t end) { rows(p, step, begin, end); });
}

void finish_carry(const FinishCarry& p) {
  p.layer.output_type == DType::kFloat64 ? finish_rows<double>(p) : finish_rows<float>(p);
}

}  // namespace sb_fast_sligru::cpu
