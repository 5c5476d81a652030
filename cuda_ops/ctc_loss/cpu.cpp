// Both ops on the CPU; ctc_loss.h has the mathematics. Utterances go to threads. A frame is a few
// vectorised loops (common/cpu_loops.h) over the positions of the target, blanks and tokens apart, and
// in the backward one over the vocabulary.
#include <vector>

#include "common/cpu_loops.h"
#include "common/log1p.h"
#include "ctc_loss/ctc_loss.h"

namespace sb_fast_sligru::ctc_loss::cpu {
namespace {

using namespace sb_fast_sligru::cpu;

constexpr float kInfinity = INFINITY;

// log(u) of a u in [1, 3]; of u = 0, anything finite or -infinity.
SLIGRU_HD double log_of_few(double u) { return std::log(u); }
SLIGRU_HD float log_of_few(float u) {
  const float y = u - 1.0f;
  return y > 1.0f ? log1p_of_fraction(0.5f * y - 0.5f) + 0.693147181f : log1p_of_fraction(y);
}

// Log 0 and NaN: the sum of the exponentials is 0 if all are log 0, and NaN if one is.
template <class T>
SLIGRU_HD T log_sum(T a, T b) {
  const T largest = a > b ? a : b, from = largest == T(-kInfinity) ? T(0) : largest;
  return largest + log_of_few(exp_of_negative(a - from) + exp_of_negative(b - from));
}

template <class T>
SLIGRU_HD T log_sum(T a, T b, T c) {
  const T two = a > b ? a : b, largest = two > c ? two : c;
  const T from = largest == T(-kInfinity) ? T(0) : largest;
  return largest + log_of_few(exp_of_negative(a - from) + exp_of_negative(b - from) +
                              exp_of_negative(c - from));
}

// One utterance.
template <class T>
struct Utterance {
  int64_t frames, tokens;  // that count
  const int64_t* target;
  const T* log_probs;
  T* skips;      // [S + 1], whether a path may go from the token before to this one, 1 or 0
  T* log_token;  // [S], of the frame
  T log_blank;
};

// Numbers that an utterance needs for itself.
SLIGRU_HD int64_t scratch_size(const Problem& d) {
  return 2 * (d.tokens + 1) + 3 * (d.positions() + 1);
}

template <class T>
SLIGRU_HD Utterance<T> make_utterance(const Problem& d, int64_t b, T*& scratch) {
  Utterance<T> u;
  u.frames = d.input_lengths[b];
  u.tokens = d.target_lengths[b];
  u.target = d.target(b);
  u.log_probs = at<T>(d.log_probs, b * d.frames * d.vocabulary);
  u.skips = scratch;
  u.log_token = scratch + d.tokens + 1;
  scratch += 2 * (d.tokens + 1);
  u.skips[0] = u.skips[u.tokens] = T(0);
  for (int64_t i = 1; i < u.tokens; ++i) u.skips[i] = T(u.target[i] != u.target[i - 1]);
  return u;
}

template <class T>
SLIGRU_HD void read_frame(const Problem& d, Utterance<T>& u, int64_t t) {
  const T* x = u.log_probs + t * d.vocabulary;
  for (int64_t i = 0; i < u.tokens; ++i) u.log_token[i] = x[u.target[i]];
  u.log_blank = x[d.blank];
}

// log P, from the last row of alpha.
template <class T>
SLIGRU_HD T log_likelihood(const Problem& d, const Utterance<T>& u, const T* alpha) {
  const T token = u.tokens > 0 ? alpha[d.tokens + u.tokens] : T(-kInfinity);
  return log_sum(alpha[u.tokens], token);
}

template <class T>
SLIGRU_HD void forward_range(const Forward& p, int64_t begin, int64_t end, T* const scratch) {
  const Problem& d = p.problem;
  const int64_t S = d.tokens, width = d.positions();
  const T zero = T(-kInfinity);
  for (int64_t b = begin; b < end; ++b) {
    T* start = scratch;
    Utterance<T> u = make_utterance(d, b, start);
    const int64_t L = u.tokens;
    std::fill(start, start + width, zero);
    start[0] = T(0);
    const T* before = start;
    T* now = at<T>(p.log_alpha, b * d.frames * width);
    for (int64_t t = 0; t < u.frames; ++t, now += width) {
      read_frame(d, u, t);
      const T *blank_before = before, *token_before = before + S + 1;
      T *blank = now, *token = now + S + 1;
      blank[0] = blank_before[0] + u.log_blank;
#pragma omp simd
      for (int64_t i = 1; i <= L; ++i)
        blank[i] = log_sum(blank_before[i], token_before[i - 1]) + u.log_blank;
      if (L > 0) token[0] = log_sum(token_before[0], blank_before[0]) + u.log_token[0];
#pragma omp simd
      for (int64_t i = 1; i < L; ++i)
        token[i] = log_sum(token_before[i], blank_before[i],
                           u.skips[i] > T(0) ? token_before[i - 1] : zero) +
                   u.log_token[i];
      std::fill(blank + L + 1, blank + S + 1, zero);
      std::fill(token + L, token + S, zero);
      before = now;
    }
    std::fill(now, at<T>(p.log_alpha, (b + 1) * d.frames * width), zero);
    const T loss = T(0) - log_likelihood(d, u, before);
    *at<T>(p.loss, b) = loss == T(kInfinity) ? T(0) : loss;
  }
}

template <class T>
SLIGRU_HD void backward_range(const Backward& p, int64_t begin, int64_t end, T* const scratch) {
  const Problem& d = p.problem;
  const int64_t S = d.tokens, V = d.vocabulary, width = d.positions();
  const T zero = T(-kInfinity);
  for (int64_t b = begin; b < end; ++b) {
    T* rows = scratch;
    Utterance<T> u = make_utterance(d, b, rows);
    const int64_t L = u.tokens, n = u.frames;
    T *later = rows, *now = rows + width + 1;  // beta; a token more, which has log 0
    T* posterior = rows + 2 * (width + 1);
    T* grad = at<T>(p.grad_log_probs, b * d.frames * V);
    const T* alphas = at<T>(p.log_alpha, b * d.frames * width);
    const T log_p = n > 0 ? log_likelihood(d, u, alphas + (n - 1) * width) : zero;
    const int64_t counted = log_p == zero ? 0 : n;
    const T scale = log_p == log_p ? *at<T>(p.grad_loss, b) : log_p;
    std::fill(grad + counted * V, grad + d.frames * V, T(0));
    std::fill(later, later + 2 * (width + 1), zero);
    later[L] = T(0);
    for (int64_t t = counted - 1; t >= 0; --t) {
      read_frame(d, u, t);
      const T *alpha = alphas + t * width, *alpha_token = alpha + S + 1;
      const T *blank_later = later, *token_later = later + S + 1;
      T *blank = now, *token = now + S + 1, *token_posterior = posterior + S + 1;
      T blanks = T(0);
#pragma omp simd reduction(+ : blanks)
      for (int64_t i = 0; i <= L; ++i) {
        const T onward = log_sum(blank_later[i], token_later[i]);
        blank[i] = onward + u.log_blank;
        blanks += exp_of_negative(alpha[i] + onward - log_p);
      }
#pragma omp simd
      for (int64_t i = 0; i < L; ++i) {
        const T onward = log_sum(token_later[i], blank_later[i + 1],
                                 u.skips[i + 1] > T(0) ? token_later[i + 1] : zero);
        token[i] = onward + u.log_token[i];
        token_posterior[i] = exp_of_negative(alpha_token[i] + onward - log_p);
      }
      const T* x = u.log_probs + t * V;
      T* out = grad + t * V;
#pragma omp simd
      for (int64_t c = 0; c < V; ++c) out[c] = exp_of_negative(x[c]) * scale;
      out[d.blank] -= blanks * scale;
      for (int64_t i = 0; i < L; ++i) out[u.target[i]] -= token_posterior[i] * scale;
      std::swap(later, now);
    }
  }
}

VECTOR_CLONES
void forward_float(const Forward& p, int64_t begin, int64_t end, float* scratch) {
  forward_range(p, begin, end, scratch);
}
VECTOR_CLONES
void forward_double(const Forward& p, int64_t begin, int64_t end, double* scratch) {
  forward_range(p, begin, end, scratch);
}
VECTOR_CLONES
void backward_float(const Backward& p, int64_t begin, int64_t end, float* scratch) {
  backward_range(p, begin, end, scratch);
}
VECTOR_CLONES
void backward_double(const Backward& p, int64_t begin, int64_t end, double* scratch) {
  backward_range(p, begin, end, scratch);
}

template <class T, class Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t, T*), const Arguments& p) {
  const Problem& d = p.problem;
  for_rows(0, d.batch, d.frames * (d.positions() + d.vocabulary), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(scratch_size(d));
    kernel(p, begin, end, scratch.data());
  });
}

}  // namespace

void forward(const Forward& p) {
  p.problem.type == DType::kFloat64 ? run(forward_double, p) : run(forward_float, p);
}

void backward(const Backward& p) {
  p.problem.type == DType::kFloat64 ? run(backward_double, p) : run(backward_float, p);
}

}  // namespace sb_fast_sligru::ctc_loss::cpu
