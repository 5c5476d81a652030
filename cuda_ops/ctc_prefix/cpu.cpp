// Both ops on the CPU; ctc_prefix.h has the mathematics. Scores: a sum over frames for each hypothesis
// and token, which go to threads. Extension: a loop over frames, for some hypotheses side by side.
// Both vectorised (common/cpu_loops.h).
#include "common/cpu_loops.h"
#include "ctc_prefix/ctc_prefix.h"

namespace sb_fast_sligru::ctc_prefix::cpu {
namespace {

using namespace sb_fast_sligru::cpu;

constexpr int64_t kLanes = 16;  // hypotheses side by side

SLIGRU_HD double log1p_of_exp(double x) { return std::log1p(std::exp(x)); }
SLIGRU_HD float log1p_of_exp(float x) { return log1p_of_fraction(exp_of_negative(x)); }

// log(exp(a) + exp(b)).
template <class T>
SLIGRU_HD T log_sum(T a, T b) {
  const T larger = a > b ? a : b;
  return larger + log1p_of_exp(-std::fabs(a - b));
}

template <class T>
SLIGRU_HD T at_least_log_zero(T x) {  // NaN stays
  return x < T(kLogZero) ? T(kLogZero) : x;
}

// log sum of exp(from + x) over n frames. A NaN gets lost among the maxima, but not in the sum.
template <class T>
SLIGRU_HD T log_sum_of_products(const T* from, const T* x, int64_t n) {
  T largest = T(kLogZero);
#pragma omp simd reduction(max : largest)
  for (int64_t t = 0; t < n; ++t) largest = from[t] + x[t] > largest ? from[t] + x[t] : largest;
  T sum = exp_of_negative(T(kLogZero) - largest);
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < n; ++t) sum += exp_of_negative(from[t] + x[t] - largest);
  return largest + std::log(sum);
}

template <class T>
SLIGRU_HD void score_range(const Scores& p, int64_t first, int64_t last) {  // of N x C
  const Prefixes& d = p.prefixes;
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = i / p.candidate_count;
    const int64_t token = p.candidates == nullptr ? i % p.candidate_count : p.candidates[i];
    const int64_t utterance = n / d.beam(), end = d.end(utterance);
    const T* from = at<T>(d.state, d.from_row(n, token));
    int64_t begin = d.begin();
    while (begin < end && from[begin] <= T(kLogZero)) ++begin;  // a frame for each token so far
    const T* x = at<T>(d.log_probs, d.log_prob_row(utterance, token));
    *at<T>(p.psi, n * d.vocabulary + token) =
        log_sum_of_products(from + begin, x + begin, end - begin);
  }
}

// The two tokens with a score of their own.
template <class T>
void score_blank_and_eos(const Scores& p) {
  const Prefixes& d = p.prefixes;
  for (int64_t n = 0; n < d.hypotheses; ++n) {
    T* psi = at<T>(p.psi, n * d.vocabulary);
    psi[d.blank] = T(kLogZero);
    psi[p.eos] = *at<T>(d.state, d.total_row(n) + d.length(n / d.beam()));
  }
}

// At most kLanes hypotheses; what is not one of them repeats the first.
template <class T>
SLIGRU_HD void extend_lanes(const Extension& p, int64_t first, int64_t count) {
  const Prefixes& d = p.prefixes;
  const T *log_probs = at<T>(d.log_probs, 0), *states = at<T>(d.state, 0);
  const int64_t begin = d.begin();
  int64_t log_prob[kLanes], log_blank[kLanes], from[kLanes], length[kLanes], end[kLanes];
  T token[kLanes], blank[kLanes], total[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t m = first + (i < count ? i : 0), parent = p.parents[m];
    const int64_t utterance = parent / d.beam();
    log_prob[i] = d.log_prob_row(utterance, p.tokens[m]);
    log_blank[i] = d.log_prob_row(utterance, d.blank);
    from[i] = d.from_row(parent, p.tokens[m]);
    length[i] = d.length(utterance);
    end[i] = d.end(utterance);
    token[i] = blank[i] = total[i] = T(kLogZero);
  }
  T* out = at<T>(p.state, first * 2 * d.states());
  for (int64_t t = 0; t < d.states(); ++t) {
    for (int64_t i = 0; i < count; ++i) {
      out[i * 2 * d.states() + t] = total[i];
      out[(i * 2 + 1) * d.states() + t] = blank[i];
    }
    if (t == d.frames) break;
    T before[kLanes], x[kLanes], x_blank[kLanes], counts[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {  // of its own, since gathering keeps loops scalar
      before[i] = states[from[i] + t];
      x[i] = log_probs[log_prob[i] + t];
      x_blank[i] = log_probs[log_blank[i] + t];
      counts[i] = T(t == 0 ? length[i] > 0 : t >= begin && t < end[i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      token[i] = at_least_log_zero(log_sum(token[i], before[i]) + x[i]);
      blank[i] = at_least_log_zero(total[i] + x_blank[i]);
      token[i] = counts[i] > T(0) ? token[i] : T(kLogZero);
      blank[i] = counts[i] > T(0) ? blank[i] : T(kLogZero);
      total[i] = log_sum(token[i], blank[i]);
    }
  }
}

template <class T>
SLIGRU_HD void extend_range(const Extension& p, int64_t first, int64_t last) {  // of kLanes each
  for (int64_t i = first; i < last; ++i)
    extend_lanes<T>(p, i * kLanes, std::min(kLanes, p.count - i * kLanes));
}

VECTOR_CLONES
void scores_float(const Scores& p, int64_t begin, int64_t end) {
  score_range<float>(p, begin, end);
}
VECTOR_CLONES
void scores_double(const Scores& p, int64_t begin, int64_t end) {
  score_range<double>(p, begin, end);
}
VECTOR_CLONES
void extend_float(const Extension& p, int64_t begin, int64_t end) {
  extend_range<float>(p, begin, end);
}
VECTOR_CLONES
void extend_double(const Extension& p, int64_t begin, int64_t end) {
  extend_range<double>(p, begin, end);
}

}  // namespace

void scores(const Scores& p) {
  const Prefixes& d = p.prefixes;
  const bool is_double = d.type == DType::kFloat64;
  const auto kernel = is_double ? scores_double : scores_float;
  for_rows(0, d.hypotheses * p.candidate_count, d.frames,
           [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  is_double ? score_blank_and_eos<double>(p) : score_blank_and_eos<float>(p);
}

void extend(const Extension& p) {
  const auto kernel = p.prefixes.type == DType::kFloat64 ? extend_double : extend_float;
  for_rows(0, ceil_div(p.count, kLanes), kLanes * p.prefixes.frames,
           [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace sb_fast_sligru::ctc_prefix::cpu
