// What the operator reads and writes, as plain pointers: the contract between the files that see
// tensors (operator.cpp, operator_cuda.cpp) and those that compute (cpu.cpp, kernels.cu). No torch
// headers.
//
// The CTC loss (Graves et al. 2006): with log p_t(c), t = 0 .. n-1, CTC's log-probabilities of token
// c at frame t, it is -log P(the n frames spell y_0 .. y_{L-1}). Before each token and after the last
// any number of frames may have the blank, so a path goes through the positions blank 0, token 0,
// blank 1, ..., token L-1, blank L: from frame to frame it stays, goes to the next position, or from
// a token to the next token if that is another one. Of a position s, alpha_t(s) is the log-probability
// of all paths that are there at frame t, including that frame, and beta_t(s) that of how they go on,
// from frame t on. With log_sum = log sum exp,
//
//   alpha_t(blank i) = log_sum(alpha_{t-1}(blank i), alpha_{t-1}(token i-1)) + log p_t(blank)
//   alpha_t(token i) = log_sum(alpha_{t-1}(token i), alpha_{t-1}(blank i),
//                              alpha_{t-1}(token i-1) if y_i != y_{i-1})     + log p_t(y_i)
//   onward_t(blank i) = log_sum(beta_{t+1}(blank i), beta_{t+1}(token i))
//   onward_t(token i) = log_sum(beta_{t+1}(token i), beta_{t+1}(blank i+1),
//                               beta_{t+1}(token i+1) if y_i != y_{i+1})
//   beta_t(s)         = onward_t(s) + log p_t(the token of s)
//
// which begin with alpha_{-1}(blank 0) = 0 and beta_n(blank L) = 0, everything else being log 0. So
//
//   log P = log_sum(alpha_{n-1}(blank L), alpha_{n-1}(token L-1))
//   P(a path is at s at frame t) = exp(alpha_t(s) + onward_t(s) - log P)
//   gradient of the loss = p_t(c) - sum of the latter over all s of token c
//
// The first term of the gradient is PyTorch's: it is that of log sum_c p_t(c), which is 0. Log 0 is
// -infinity. A loss that is infinite, since the frames cannot spell the tokens, is 0, and so is its
// gradient (SpeechBrain's zero_infinity). A NaN makes the loss NaN and the gradient of all frames that
// count.
//
// Axes: B utterances, T frames, V tokens of the vocabulary, S tokens of the longest target. All
// tensors are contiguous. A row of alpha has the blanks 0 .. S, then the tokens 0 .. S-1.
#pragma once

#include "common/types.h"

namespace sb_fast_sligru::ctc_loss {

struct Problem {
  int64_t batch, frames, vocabulary, tokens;
  int64_t blank;
  DType type;  // of log_probs, loss, log_alpha and gradients

  const void* log_probs;          // [B, T, V]
  const int64_t* targets;         // [B, S]
  const int64_t* input_lengths;   // [B]
  const int64_t* target_lengths;  // [B]

  SLIGRU_HD int64_t positions() const { return 2 * tokens + 1; }
  SLIGRU_HD const int64_t* target(int64_t utterance) const { return targets + utterance * tokens; }
};

struct Forward {
  Problem problem;
  void* loss;       // [B]
  void* log_alpha;  // [B, T, 2 S + 1]; log 0 where nothing counts
  float* rows;      // CUDA, of more positions than shared memory holds: [B, 2, 2 S + 1]
};

// A position of a target, in the list of those with the same token.
struct Link {
  int32_t next;   // beyond the target: none
  int32_t first;  // whether none is before it, and the token is not the blank
};

struct Backward {
  Problem problem;
  const void* grad_loss;  // [B]
  const void* log_alpha;
  void* grad_log_probs;  // [B, T, V]
  // CUDA: what its first kernel leaves to its second.
  float* rows;         // as above
  float* posteriors;   // [B, T, 2 S + 1]
  Link* links;         // [B, S]
  float* scales;       // [B], grad_loss, or NaN
  int64_t* gradients;  // [B], the number of frames with a gradient
};

namespace cpu {
void forward(const Forward& p);
void backward(const Backward& p);
}  // namespace cpu

namespace cuda {  // on the current device, float32; throw std::runtime_error if a launch fails
bool rows_fit(int64_t positions);  // in shared memory
void forward(const Forward& p, void* stream);
void backward(const Backward& p, void* stream);
}  // namespace cuda

}  // namespace sb_fast_sligru::ctc_loss
