// What the two ops read and write, as plain pointers: the contract between the files that see tensors
// (operator.cpp, operator_cuda.cpp) and those that compute (cpu.cpp, kernels.cu). No torch headers.
//
// CTC prefix scores (Watanabe et al. 2017, Algorithm 2): log p_t(c), t = 0 .. T-1, are CTC's
// log-probabilities of token c at frame t. Of a hypothesis g, a sequence of tokens, its state has
//
//   blank_t = log P(the first t frames spell g, the last of them is a blank)
//   total_t = log P(the first t frames spell g),   t = 0 .. T
//
// so for the empty one total_0 = blank_0 = 0, and log 0 for every other. Followed by token c
// (extend), where from_t is what of g may stand before c: blank_t if g ends in c, else total_t:
//
//   token'_{t+1} = log(exp token'_t + exp from_t) + log p_t(c)     the last frame is c
//   blank'_{t+1} = total'_t + log p_t(blank)
//   total'_t     = log(exp token'_t + exp blank'_t)
//
// and the probability of all that begin with g and c (scores):
//
//   psi(c) = log sum_t exp(from_t + log p_t(c)),   psi(eos) = total at the utterance's last frame
//
// Log 0 is -1e20, as in SpeechBrain, and nothing gets below it: no infinities, so no NaN that is not
// in the arguments. psi(blank) is log 0 too, and so is that of tokens that are not scored.
//
// Frames from an utterance's length on do not count. Neither do those outside a window, which is
// given for all hypotheses as SpeechBrain does: frame 0 counts in it for psi if frame 1 does, and for
// the state always.
//
// Axes: B utterances, T frames, V tokens, N hypotheses, N / B in a row for each utterance, C
// candidates of each hypothesis. All tensors are contiguous, and frames their last axis: the scores
// are sums over them, of few tokens of each frame.
#pragma once

#include "common/log1p.h"
#include "common/types.h"

namespace sb_fast_sligru::ctc_prefix {

constexpr double kLogZero = -1e20;

struct Prefixes {
  int64_t batch, frames, vocabulary, hypotheses;
  int64_t blank;
  DType type;  // of log_probs, states and psi

  const void* log_probs;       // [B, V, T]
  const int64_t* lengths;      // [B]
  const void* state;           // [N, 2, T + 1]: total, blank
  const int64_t* last_tokens;  // [N]
  const int64_t* window;       // [2], its first frame and the one after its last; null: all frames

  SLIGRU_HD int64_t beam() const { return hypotheses / batch; }
  SLIGRU_HD int64_t states() const { return frames + 1; }
  // Where the rows of a token of an utterance and of a hypothesis begin.
  SLIGRU_HD int64_t log_prob_row(int64_t utterance, int64_t token) const {
    return (utterance * vocabulary + token) * frames;
  }
  SLIGRU_HD int64_t total_row(int64_t hypothesis) const { return hypothesis * 2 * states(); }
  // The row of what may stand before a token.
  SLIGRU_HD int64_t from_row(int64_t hypothesis, int64_t token) const {
    return total_row(hypothesis) + (token == last_tokens[hypothesis] ? states() : 0);
  }
  SLIGRU_HD int64_t length(int64_t utterance) const {
    const int64_t length = lengths[utterance];
    return length < 0 ? 0 : length > frames ? frames : length;
  }
  SLIGRU_HD int64_t begin() const { return window == nullptr || window[0] <= 1 ? 0 : window[0]; }
  SLIGRU_HD int64_t end(int64_t utterance) const {
    const int64_t own = length(utterance);
    return window == nullptr || window[1] > own ? own : window[1];
  }
};

struct Scores {
  Prefixes prefixes;
  int64_t eos;
  int64_t candidate_count;    // C, or V
  const int64_t* candidates;  // [N, C], or null for all tokens
  void* psi;                  // [N, V]; with candidates log 0 has been written to all of it
};

struct Extension {
  Prefixes prefixes;
  int64_t count;           // M, of the new hypotheses
  const int64_t* parents;  // [M], of which hypothesis each is one
  const int64_t* tokens;   // [M], and with which token
  void* state;             // [M, 2, T + 1]
};

namespace cpu {
void scores(const Scores& p);
void extend(const Extension& p);
}  // namespace cpu

namespace cuda {  // on the current device, float32; throw std::runtime_error if a launch fails
int64_t score_blocks(const Scores& p);
void scores(const Scores& p, void* stream);
void extend(const Extension& p, void* stream);
}  // namespace cuda

}  // namespace sb_fast_sligru::ctc_prefix
