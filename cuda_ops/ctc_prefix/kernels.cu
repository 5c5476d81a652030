// Both ops on CUDA GPUs, in float32; ctc_prefix.h has the mathematics.
//
// Scores: a warp has a hypothesis and kTokens tokens at a time, whose frames go to its lanes; it reads
// them twice, for the largest term and for the sum. A block's warps share what stands before the
// tokens. Extension: a thread has a hypothesis and goes from frame to frame, with the numbers of the
// next kAhead frames on their way.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/warp.cuh"
#include "ctc_prefix/ctc_prefix.h"

namespace sb_fast_sligru::ctc_prefix::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;   // of a block of the scores
constexpr int kTokens = 2;  // of a warp
constexpr int kAhead = 8;
constexpr float kZero = static_cast<float>(kLogZero);

__device__ __forceinline__ float log_sum(float a, float b) {
  return fmaxf(a, b) + log1p_of_fraction(expf(-fabsf(a - b)));
}

__device__ __forceinline__ float at_least_log_zero(float x) {  // NaN stays
  return x < kZero ? kZero : x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = max_lane_xor(x, offset);
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = add_lane_xor(x, offset);
  return x;
}

__global__ void __launch_bounds__(kWarp* kWarps)
    scores_kernel(const Scores p, int64_t blocks_of_hypothesis) {
  const Prefixes& d = p.prefixes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = blockIdx.x / blocks_of_hypothesis, utterance = n / d.beam();
  const int64_t first = (blockIdx.x % blocks_of_hypothesis * kWarps + warp) * kTokens;
  const float *log_probs = static_cast<const float*>(d.log_probs),
              *states = static_cast<const float*>(d.state);
  float* psi = static_cast<float*>(p.psi) + n * d.vocabulary;
  if (first == 0 && lane == 0) {
    psi[d.blank] = kZero;
    psi[p.eos] = states[d.total_row(n) + d.length(utterance)];
  }

  int64_t token[kTokens];
  bool scored[kTokens];
  const float *x[kTokens], *from[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    scored[i] = first + i < p.candidate_count;
    token[i] = 0;
    if (scored[i])
      token[i] =
          p.candidates == nullptr ? first + i : p.candidates[n * p.candidate_count + first + i];
    scored[i] = scored[i] && token[i] >= 0 && token[i] < d.vocabulary && token[i] != d.blank &&
                token[i] != p.eos;
    if (!scored[i]) token[i] = 0;  // of which there is always one to read
    x[i] = log_probs + d.log_prob_row(utterance, token[i]);
    from[i] = states + d.from_row(n, token[i]);
  }
  const int64_t begin = d.begin() + lane, end = d.end(utterance);
  float largest[kTokens], sum[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; i++) largest[i] = kZero;
#pragma unroll 4
  for (int64_t t = begin; t < end; t += kWarp)
#pragma unroll
    for (int i = 0; i < kTokens; i++) largest[i] = fmaxf(largest[i], from[i][t] + x[i][t]);
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    largest[i] = warp_max(largest[i]);  // without NaN, which the sum has
    sum[i] = 0.f;
  }
#pragma unroll 4
  for (int64_t t = begin; t < end; t += kWarp)
#pragma unroll
    for (int i = 0; i < kTokens; i++) sum[i] += expf(from[i][t] + x[i][t] - largest[i]);
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    const float total = warp_sum(sum[i]) + expf(kZero - largest[i]);
    if (scored[i] && lane == 0) psi[token[i]] = largest[i] + logf(total);
  }
}

// What a thread reads of a frame.
struct Frame {
  float from, log_prob, log_blank;
};

__global__ void __launch_bounds__(kWarp) extend_kernel(const Extension p) {
  const Prefixes& d = p.prefixes;
  const int64_t m = int64_t{blockIdx.x} * kWarp + threadIdx.x, T = d.frames;
  if (m >= p.count) return;
  int64_t parent = p.parents[m], token = p.tokens[m];
  const bool exists = parent >= 0 && parent < d.hypotheses && token >= 0 && token < d.vocabulary;
  if (!exists) parent = token = 0;
  const int64_t utterance = parent / d.beam();
  const float *log_probs = static_cast<const float*>(d.log_probs),
              *x = log_probs + d.log_prob_row(utterance, token),
              *x_blank = log_probs + d.log_prob_row(utterance, d.blank),
              *from = static_cast<const float*>(d.state) + d.from_row(parent, token);
  const int64_t begin = d.begin(), end = d.end(utterance);
  const bool first_counts = exists && d.length(utterance) > 0;
  float *totals = static_cast<float*>(p.state) + m * 2 * d.states(), *blanks = totals + d.states();

  Frame ahead[kAhead];
  auto read = [&](int64_t t0) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int64_t t = t0 + i;
      ahead[i] = t < T ? Frame{from[t], x[t], x_blank[t]} : Frame{};
    }
  };
  float token_now = kZero, blank = kZero, total = kZero;
  totals[0] = total;
  blanks[0] = blank;
  read(0);
  for (int64_t t0 = 0; t0 < T; t0 += kAhead) {
    Frame now[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) now[i] = ahead[i];
    read(t0 + kAhead);
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int64_t t = t0 + i;
      if (t >= T) break;
      const bool counts = t == 0 ? first_counts : exists && t >= begin && t < end;
      token_now = at_least_log_zero(log_sum(token_now, now[i].from) + now[i].log_prob);
      blank = at_least_log_zero(total + now[i].log_blank);
      if (!counts) token_now = blank = kZero;
      total = log_sum(token_now, blank);
      totals[t + 1] = total;
      blanks[t + 1] = blank;
    }
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sb_fast_sligru: a kernel did not launch: ") +
                             cudaGetErrorString(error));
}

int64_t blocks_of_hypothesis(const Scores& p) {
  return ceil_div(p.candidate_count > 0 ? p.candidate_count : 1, kWarps * kTokens);
}

}  // namespace

int64_t score_blocks(const Scores& p) { return p.prefixes.hypotheses * blocks_of_hypothesis(p); }

void scores(const Scores& p, void* stream) {
  scores_kernel<<<static_cast<unsigned>(score_blocks(p)), kWarp * kWarps, 0,
                  static_cast<cudaStream_t>(stream)>>>(p, blocks_of_hypothesis(p));
  check(cudaGetLastError());
}

void extend(const Extension& p, void* stream) {
  extend_kernel<<<static_cast<unsigned>(ceil_div(p.count, kWarp)), kWarp, 0,
                  static_cast<cudaStream_t>(stream)>>>(p);
  check(cudaGetLastError());
}

}  // namespace sb_fast_sligru::ctc_prefix::cuda
