// Both passes on the CPU. Groups, or parts of them, go to threads; the loops within are over the
// channels, or all values of a frame, and vectorised (common/cpu_loops.h).
#include <vector>

#include "common/cpu_loops.h"
#include "norm_pool/norm_pool.h"

namespace sb_fast_sligru::norm_pool::cpu {
namespace {

using namespace sb_fast_sligru::cpu;

constexpr int64_t kSum = 512;       // values added up at once: few enough to round little
constexpr int64_t kMostParts = 64;  // of the backward
constexpr int64_t kPart = 16 * kElementsPerThread;  // values of one, at least

template <class T>
struct Statistics {
  T mean, rstd;
};

// The convolution's bias for all values of a frame.
template <class T>
SLIGRU_HD void spread_bias(const NormPool& d, T* bias) {
  for (int64_t f = 0; f < d.frequencies; ++f)
    std::copy(at<T>(d.bias, 0), at<T>(d.bias, d.channels), bias + f * d.channels);
}

template <class T>
SLIGRU_HD Statistics<T> statistics_of(const T* x, const T* bias, int64_t n, double eps) {
  T sum = 0;
  for (int64_t begin = 0; begin < n; begin += kSum) {
    const int64_t end = std::min(begin + kSum, n);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += x[i] + bias[i];
    sum += part;
  }
  const T mean = sum / T(n);
  T squares = 0;
  for (int64_t begin = 0; begin < n; begin += kSum) {
    const int64_t end = std::min(begin + kSum, n);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) {
      const T distance = x[i] + bias[i] - mean;
      part += distance * distance;
    }
    squares += part;
  }
  return {mean, T(1) / std::sqrt(squares / T(n) + T(eps))};
}

template <class T>
SLIGRU_HD T normalised(T x, T bias, Statistics<T> s) {
  return (x + bias - s.mean) * s.rstd;
}

template <class T>
SLIGRU_HD T leaky(T z, T slope) {
  return z > T(0) ? z : slope * z;
}

template <class T>
SLIGRU_HD void activate(const NormPool& d, const T* x, const T* bias, Statistics<T> s, T* a) {
  const T *w = at<T>(d.ln_weight, 0), *b = at<T>(d.ln_bias, 0), slope = T(d.slope);
  const int64_t n = d.values();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = leaky(normalised(x[i], bias[i], s) * w[i] + b[i], slope);
}

template <class T>
SLIGRU_HD void forward_range(const Forward& p, int64_t begin, int64_t end) {
  const NormPool& d = p.layer;
  const int64_t N = d.values(), C = d.channels, FP = d.pooled_frequencies(), TP = d.pooled_time();
  std::vector<T> scratch(2 * N + FP * C);
  T *bias = scratch.data(), *a = bias + N, *largest = a + N;
  spread_bias(d, bias);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group / TP, t = group % TP;
    for (int64_t k = 0; k < d.pool_time; ++k) {
      const T* x = at<T>(d.x, (row * d.x_time + t * d.pool_time + k) * N);
      const Statistics<T> s = statistics_of(x, bias, N, d.eps);
      T* saved = at<T>(p.statistics, (group * d.pool_time + k) * 2);
      saved[0] = s.mean;
      saved[1] = s.rstd;
      activate(d, x, bias, s, a);
      for (int64_t f = 0; f < FP; ++f) {
        T* best = largest + f * C;
        for (int64_t j = 0; j < d.pool_frequency; ++j) {
          const T* value = a + (f * d.pool_frequency + j) * C;
          if (k == 0 && j == 0) {
            std::copy(value, value + C, best);
            continue;
          }
#pragma omp simd
          for (int64_t c = 0; c < C; ++c)
            best[c] = value[c] > best[c] || value[c] != value[c] ? value[c] : best[c];
        }
      }
    }
    for (int64_t f = 0; f < FP; ++f) {
      T* best = largest + f * C;
      if (const T* mask = at<T>(d.drop_mask, row * FP + f)) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) best[c] *= *mask;
      }
      for (int i = 0; i < kCopies; ++i) {
        const int64_t to_t = position(t, TP, d.halo, i);
        for (int j = 0; j < kCopies; ++j) {
          const int64_t to_f = position(f, FP, d.halo, j);
          if (to_t < 0 || to_f < 0) continue;
          T* out = at<T>(p.out, ((row * d.out_time() + to_t) * d.out_frequencies() + to_f) * C);
          std::copy(best, best + C, out);
        }
      }
    }
    if (t == TP - 1) {  // frames that are none of its own
      const int64_t frame = d.out_frequencies() * C;
      std::fill(at<T>(p.out, (row * d.out_time() + d.own_out_time()) * frame),
                at<T>(p.out, (row + 1) * d.out_time() * frame), T(0));
    }
  }
}

// Gradient of the window at (t, f), [C]: what the output's copies of it have, times the mask.
template <class T>
SLIGRU_HD void gather_gradient(const Backward& p, int64_t row, int64_t t, int64_t f, T* g) {
  const NormPool& d = p.layer;
  const int64_t C = d.channels;
  std::fill(g, g + C, T(0));
  for (int i = 0; i < kCopies; ++i) {
    const int64_t from_t = position(t, d.pooled_time(), d.halo, i);
    for (int j = 0; j < kCopies; ++j) {
      const int64_t from_f = position(f, d.pooled_frequencies(), d.halo, j);
      if (from_t < 0 || from_f < 0) continue;
      const T* grad =
          at<T>(p.grad_out, ((row * d.out_time() + from_t) * d.out_frequencies() + from_f) * C);
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) g[c] += grad[c];
    }
  }
  if (const T* mask = at<T>(d.drop_mask, row * d.pooled_frequencies() + f)) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) g[c] *= *mask;
  }
}

// Scratch of one thread.
template <class T>
struct Workspace {
  std::vector<T> memory;
  std::vector<int32_t> places;
  T *bias, *a, *e, *g, *largest;
  int32_t* winner;  // of each window: its first largest value

  explicit Workspace(const NormPool& d) {
    const int64_t N = d.values(), M = d.pooled_frequencies() * d.channels;
    memory.resize(3 * N + 2 * M);
    places.resize(M);
    bias = memory.data();
    a = bias + N;
    e = a + N;
    g = e + N;
    largest = g + M;
    winner = places.data();
  }
};

template <class T>
SLIGRU_HD void find_winners(const NormPool& d, int64_t row, int64_t t, const T* statistics,
                            const Workspace<T>& w) {
  const int64_t N = d.values(), C = d.channels, FP = d.pooled_frequencies();
  for (int64_t k = 0; k < d.pool_time; ++k) {
    activate(d, at<T>(d.x, (row * d.x_time + t * d.pool_time + k) * N), w.bias,
             {statistics[2 * k], statistics[2 * k + 1]}, w.a);
    for (int64_t f = 0; f < FP; ++f) {
      T* best = w.largest + f * C;
      int32_t* winner = w.winner + f * C;
      for (int64_t j = 0; j < d.pool_frequency; ++j) {
        const T* value = w.a + (f * d.pool_frequency + j) * C;
        const int32_t place = static_cast<int32_t>(k * d.pool_frequency + j);
        if (place == 0) {
          std::copy(value, value + C, best);
          std::fill(winner, winner + C, 0);
          continue;
        }
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          const bool larger = value[c] > best[c] || value[c] != value[c];
          best[c] = larger ? value[c] : best[c];
          winner[c] = larger ? place : winner[c];
        }
      }
    }
  }
}

// One frame, the k-th of its windows.
template <class T>
SLIGRU_HD void backward_frame(const Backward& p, const T* x, Statistics<T> s, int64_t k,
                              const Workspace<T>& w, T* bias_sums, T* weight_sums, T* shift_sums,
                              T* grad_x) {
  const NormPool& d = p.layer;
  const int64_t N = d.values(), C = d.channels, FP = d.pooled_frequencies();
  const T slope = T(d.slope);
  const bool all_win = d.window() == 1;
  T sum = 0, projection = 0;
  for (int64_t f = 0; f < d.frequencies; ++f) {
    const int64_t window = f / d.pool_frequency, offset = f * C;
    T* e = w.e + offset;
    if (window >= FP) {
      std::fill(e, e + C, T(0));
      continue;
    }
    const int32_t place = static_cast<int32_t>(k * d.pool_frequency + f % d.pool_frequency);
    const int32_t* winner = w.winner + window * C;
    const T *value = x + offset, *bias = w.bias + offset, *g = w.g + window * C,
            *weight = at<T>(d.ln_weight, offset), *shift = at<T>(d.ln_bias, offset);
    T *weight_sum = weight_sums + offset, *shift_sum = shift_sums + offset;
    T part = 0, projected = 0;
#pragma omp simd reduction(+ : part, projected)
    for (int64_t c = 0; c < C; ++c) {
      const T xh = normalised(value[c], bias[c], s);
      const T received = all_win || winner[c] == place ? g[c] : T(0);
      const T dz = xh * weight[c] + shift[c] > T(0) ? received : slope * received;
      weight_sum[c] += dz * xh;
      shift_sum[c] += dz;
      e[c] = dz * weight[c];
      part += e[c];
      projected += e[c] * xh;
    }
    sum += part;
    projection += projected;
  }
  const T mean = sum / T(N), slant = projection / T(N);
  for (int64_t f = 0; f < d.frequencies; ++f) {
    const int64_t offset = f * C;
    const T *value = x + offset, *bias = w.bias + offset;
    T *e = w.e + offset, *dx = grad_x == nullptr ? e : grad_x + offset;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      dx[c] = s.rstd * (e[c] - mean - normalised(value[c], bias[c], s) * slant);
      bias_sums[c] += dx[c];
    }
  }
}

template <class T>
SLIGRU_HD void backward_range(const Backward& p, int64_t begin, int64_t end) {  // parts
  const NormPool& d = p.layer;
  const int64_t N = d.values(), C = d.channels, TP = d.pooled_time(), FP = d.pooled_frequencies();
  const Workspace<T> w(d);
  spread_bias(d, w.bias);
  for (int64_t part = begin; part < end; ++part) {
    T *bias_sums = at<T>(p.bias_sums, part * C), *weight_sums = at<T>(p.ln_weight_sums, part * N),
      *shift_sums = at<T>(p.ln_bias_sums, part * N);
    std::fill(bias_sums, bias_sums + C, T(0));
    std::fill(weight_sums, weight_sums + N, T(0));
    std::fill(shift_sums, shift_sums + N, T(0));
    const int64_t last = d.groups() * (part + 1) / p.parts;
    for (int64_t group = d.groups() * part / p.parts; group < last; ++group) {
      const int64_t row = group / TP, t = group % TP;
      const T* statistics = at<T>(p.statistics, group * d.pool_time * 2);
      for (int64_t f = 0; f < FP; ++f) gather_gradient(p, row, t, f, w.g + f * C);
      if (d.window() > 1) find_winners(d, row, t, statistics, w);
      for (int64_t k = 0; k < d.pool_time; ++k) {
        const int64_t frame = row * d.x_time + t * d.pool_time + k;
        backward_frame(p, at<T>(d.x, frame * N), {statistics[2 * k], statistics[2 * k + 1]}, k, w,
                       bias_sums, weight_sums, shift_sums, at<T>(p.grad_x, frame * N));
      }
      if (t == TP - 1 && p.grad_x != nullptr) {  // frames that fill no window or do not count
        std::fill(at<T>(p.grad_x, (row * d.x_time + TP * d.pool_time) * N),
                  at<T>(p.grad_x, (row + 1) * d.x_time * N), T(0));
      }
    }
  }
}

VECTOR_CLONES
void forward_float(const Forward& p, int64_t begin, int64_t end) {
  forward_range<float>(p, begin, end);
}
VECTOR_CLONES
void forward_double(const Forward& p, int64_t begin, int64_t end) {
  forward_range<double>(p, begin, end);
}
VECTOR_CLONES
void backward_float(const Backward& p, int64_t begin, int64_t end) {
  backward_range<float>(p, begin, end);
}
VECTOR_CLONES
void backward_double(const Backward& p, int64_t begin, int64_t end) {
  backward_range<double>(p, begin, end);
}

}  // namespace

int64_t backward_parts(const NormPool& layer) {
  const int64_t values = layer.groups() * layer.pool_time * layer.values();
  return std::clamp<int64_t>(values / kPart, 1, std::min(kMostParts, layer.groups()));
}

void forward(const Forward& p) {
  const NormPool& d = p.layer;
  const auto kernel = d.x_type == DType::kFloat64 ? forward_double : forward_float;
  // Four values cost about as much as an element of other kernels.
  for_rows(0, d.groups(), d.pool_time * d.values() / 4,
           [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void backward(const Backward& p) {
  const auto kernel = p.layer.x_type == DType::kFloat64 ? backward_double : backward_float;
  for_rows(0, p.parts, kPart, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace sb_fast_sligru::norm_pool::cpu
