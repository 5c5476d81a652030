// Both ops on the CPU; ctc_prefix.h has the mathematics. Scores: hypotheses, or tokens of an
// utterance, go to threads, the loops within are over tokens. Extension: over hypotheses, frame by
// frame. All vectorised (common/cpu_loops.h).
#include "ctc_prefix/ctc_prefix.h"

#include <vector>

#include "common/cpu_loops.h"

namespace sb_fast_sligru::ctc_prefix::cpu {
namespace {

using namespace sb_fast_sligru::cpu;

constexpr int64_t kColumns = 128;  // tokens at once: few enough that all their frames stay in L2

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

// psi of tokens whose log-probabilities lie next to each other, `stride` apart from frame to frame
// and beginning with frame `begin`. `from` is a column of the state.
template <class T>
SLIGRU_HD void score_columns(const Prefixes& d, const T* from, int64_t begin, int64_t end,
                             const T* log_probs, int64_t stride, int64_t columns, T* psi) {
  T largest[kColumns], sum[kColumns];
  std::fill(largest, largest + columns, T(kLogZero));
  const T* x = log_probs;
  for (int64_t t = begin; t < end; ++t, x += stride) {
    const T before = from[t * 2 * d.hypotheses];
    if (before <= T(kLogZero)) continue;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const T y = before + x[j];
      largest[j] = y > largest[j] || y != y ? y : largest[j];
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) sum[j] = exp_of_negative(T(kLogZero) - largest[j]);
  x = log_probs;
  for (int64_t t = begin; t < end; ++t, x += stride) {
    const T before = from[t * 2 * d.hypotheses];
    if (before <= T(kLogZero)) continue;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) sum[j] += exp_of_negative(before + x[j] - largest[j]);
  }
  for (int64_t j = 0; j < columns; ++j) psi[j] = largest[j] + std::log(sum[j]);
}

// All tokens: a unit is some tokens of an utterance, for each of its hypotheses.
template <class T>
SLIGRU_HD void score_all(const Scores& p, int64_t first_unit, int64_t last_unit) {
  const Prefixes& d = p.prefixes;
  const int64_t V = d.vocabulary, N = d.hypotheses, tiles = ceil_div(V, kColumns);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t utterance = unit / tiles, token = unit % tiles * kColumns;
    const int64_t columns = std::min(kColumns, V - token);
    const int64_t begin = d.begin(), end = d.end(utterance);
    const T* x = at<T>(d.log_probs, (utterance * d.frames + begin) * V + token);
    for (int64_t n = utterance * d.beam(); n < (utterance + 1) * d.beam(); ++n) {
      T* psi = at<T>(p.psi, n * V + token);
      score_columns(d, at<T>(d.state, n), begin, end, x, V, columns, psi);
      const int64_t repeated = d.last_tokens[n] - token;
      if (repeated >= 0 && repeated < columns)
        score_columns(d, at<T>(d.state, N + n), begin, end, x + repeated, V, 1, psi + repeated);
    }
  }
}

// Candidates alone, whose log-probabilities are gathered: a unit is a hypothesis.
template <class T>
SLIGRU_HD void score_candidates(const Scores& p, int64_t first, int64_t last) {
  const Prefixes& d = p.prefixes;
  const int64_t V = d.vocabulary, N = d.hypotheses, C = p.candidate_count;
  const int64_t begin = d.begin();
  std::vector<T> gathered(std::min(C, kColumns) * d.frames);
  T psi[kColumns];
  for (int64_t n = first; n < last; ++n) {
    const int64_t utterance = n / d.beam(), end = d.end(utterance);
    for (int64_t tile = 0; tile < C; tile += kColumns) {
      const int64_t columns = std::min(kColumns, C - tile);
      const int64_t* tokens = p.candidates + n * C + tile;
      T* to = gathered.data();
      for (int64_t t = begin; t < end; ++t, to += columns) {
        const T* x = at<T>(d.log_probs, (utterance * d.frames + t) * V);
        for (int64_t j = 0; j < columns; ++j) to[j] = x[tokens[j]];
      }
      score_columns(d, at<T>(d.state, n), begin, end, gathered.data(), columns, columns, psi);
      for (int64_t j = 0; j < columns; ++j) {
        if (tokens[j] == d.last_tokens[n])
          score_columns(d, at<T>(d.state, N + n), begin, end, gathered.data() + j, columns, 1,
                        psi + j);
        *at<T>(p.psi, n * V + tokens[j]) = psi[j];
      }
    }
  }
}

template <class T>
SLIGRU_HD void score_range(const Scores& p, int64_t begin, int64_t end) {
  p.candidates == nullptr ? score_all<T>(p, begin, end) : score_candidates<T>(p, begin, end);
}

// The two tokens with a score of their own.
template <class T>
void score_eos_and_blank(const Scores& p) {
  const Prefixes& d = p.prefixes;
  const int64_t V = d.vocabulary, N = d.hypotheses;
  for (int64_t n = 0; n < N; ++n) {
    *at<T>(p.psi, n * V + d.blank) = T(kLogZero);
    *at<T>(p.psi, n * V + p.eos) = *at<T>(d.state, d.length(n / d.beam()) * 2 * N + n);
  }
}

// Of a new hypothesis: where the numbers of frame 0 are, and which frames count.
template <class T>
struct Row {
  std::vector<const T*> log_prob, log_blank, from;
  std::vector<int64_t> length, end;
  std::vector<T> token, blank, total;

  explicit Row(int64_t count)
      : log_prob(count),
        log_blank(count),
        from(count),
        length(count),
        end(count),
        token(count, T(kLogZero)),
        blank(count, T(kLogZero)),
        total(count, T(kLogZero)) {}
};

template <class T>
SLIGRU_HD void extend_range(const Extension& p, int64_t first, int64_t last) {
  const Prefixes& d = p.prefixes;
  const int64_t V = d.vocabulary, N = d.hypotheses, M = p.count, count = last - first;
  const int64_t begin = d.begin();
  Row<T> row(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t parent = p.parents[first + i], token = p.tokens[first + i];
    const int64_t utterance = parent / d.beam();
    const T* x = at<T>(d.log_probs, utterance * d.frames * V);
    row.log_prob[i] = x + token;
    row.log_blank[i] = x + d.blank;
    row.from[i] = at<T>(d.state, (token == d.last_tokens[parent] ? N : 0) + parent);
    row.length[i] = d.length(utterance);
    row.end[i] = d.end(utterance);
  }
  const T *const *log_prob = row.log_prob.data(), *const *log_blank = row.log_blank.data(),
                 *const *from = row.from.data();
  const int64_t *length = row.length.data(), *end = row.end.data();
  T *token = row.token.data(), *blank = row.blank.data(), *total = row.total.data();
  for (int64_t t = 0; t <= d.frames; ++t) {
    T* out = at<T>(p.state, t * 2 * M + first);
    std::copy(total, total + count, out);
    std::copy(blank, blank + count, out + M);
    if (t == d.frames) break;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const bool counts = t == 0 ? t < length[i] : t >= begin && t < end[i];
      const T token_now = log_sum(token[i], from[i][t * 2 * N]) + log_prob[i][t * V];
      const T blank_now = total[i] + log_blank[i][t * V];
      token[i] = counts ? at_least_log_zero(token_now) : T(kLogZero);
      blank[i] = counts ? at_least_log_zero(blank_now) : T(kLogZero);
      total[i] = log_sum(token[i], blank[i]);
    }
  }
}

VECTOR_CLONES
void scores_float(const Scores& p, int64_t begin, int64_t end) { score_range<float>(p, begin, end); }
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
  const bool is_double = d.type == DType::kFloat64, all = p.candidates == nullptr;
  const auto kernel = is_double ? scores_double : scores_float;
  const int64_t units = all ? d.batch * ceil_div(d.vocabulary, kColumns) : d.hypotheses;
  const int64_t work = d.frames * (all ? d.beam() * kColumns : p.candidate_count);
  for_rows(0, units, work, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  is_double ? score_eos_and_blank<double>(p) : score_eos_and_blank<float>(p);
}

void extend(const Extension& p) {
  const auto kernel = p.prefixes.type == DType::kFloat64 ? extend_double : extend_float;
  for_rows(0, p.count, p.prefixes.frames,
           [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace sb_fast_sligru::ctc_prefix::cpu
