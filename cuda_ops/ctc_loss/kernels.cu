// Both ops on CUDA GPUs, in float32; ctc_loss.h has the mathematics.
//
// alpha and beta: a block has an utterance and goes from frame to frame, with a barrier after each.
// Thread i has blank i and token i of the target, and i plus the number of threads, and so on. Of the
// row before, it needs its own two positions and one or two of its neighbour's: two rows alternate in
// shared memory, or in global memory where they are too long for that. What a thread reads of the
// first kAhead frames of the next group, for its first two positions, is on its way while it computes
// this group's: the log-probabilities of the target's tokens lie scattered over the vocabulary.
//
// The gradient: a block has a frame. It writes p_t(c) for the whole vocabulary, then the tokens of the
// target in place of theirs. Those that a target has several times are a linked list, so one thread
// adds up what they have, in the list's order; the blanks are a sum over the block.
//
// Lengths and tokens are checked here, since the host would have to wait for them. If one is out of
// range, nothing of that utterance is looked up by it, and its results are NaN.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/warp.cuh"
#include "ctc_loss/ctc_loss.h"

namespace sb_fast_sligru::ctc_loss::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 512;      // of a block for an utterance
constexpr int kGradientThreads = 256;  // of a block for a frame
constexpr int kAhead = 8;
constexpr int64_t kSharedBytes = 48 * 1024;  // that any GPU gives any kernel
constexpr float kLogZero = -INFINITY;

// ---- sums of probabilities
// Log 0 and NaN: the sum of the exponentials is 0 if all are log 0, and NaN if one is.

__device__ __forceinline__ float log_sum(float a, float b) {
  const float largest = fmaxf(a, b), from = largest == kLogZero ? 0.f : largest;
  return from + logf(expf(a - from) + expf(b - from));
}

__device__ __forceinline__ float log_sum(float a, float b, float c) {
  const float largest = fmaxf(fmaxf(a, b), c), from = largest == kLogZero ? 0.f : largest;
  return from + logf(expf(a - from) + expf(b - from) + expf(c - from));
}

// ---- an utterance, as a block has it
struct Utterance {
  const float* log_probs;  // [T, V]
  const int64_t* target;
  int64_t vocabulary, blank;
  int64_t frames;  // that count
  int tokens;      // that count
  int row;         // S: where the tokens of a row begin is one more

  __device__ int blank_at(int i) const { return i; }
  __device__ int token_at(int i) const { return row + 1 + i; }
};

__device__ __forceinline__ Utterance make_utterance(const Problem& d, int64_t b) {
  return {static_cast<const float*>(d.log_probs) + b * d.frames * d.vocabulary,
          d.target(b),
          d.vocabulary,
          d.blank,
          d.input_lengths[b],
          static_cast<int>(d.target_lengths[b]),
          static_cast<int>(d.tokens)};
}

// Whether lengths, and the tokens that count, are in range. For all threads of the block.
__device__ bool in_range(const Problem& d, int64_t b) {
  const int64_t frames = d.input_lengths[b], tokens = d.target_lengths[b];
  bool fits = frames >= 0 && frames <= d.frames && tokens >= 0 && tokens <= d.tokens;
  if (fits) {
    for (int64_t i = threadIdx.x; i < tokens; i += blockDim.x) {
      const int64_t token = d.target(b)[i];
      fits = fits && token >= 0 && token < d.vocabulary;
    }
  }
  return __syncthreads_and(fits);
}

__device__ void fill(float* from, int64_t count, float value) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) from[i] = value;
}

__device__ __forceinline__ float log_likelihood(const Utterance& u, const float* alpha) {
  return log_sum(alpha[u.blank_at(u.tokens)],
                 u.tokens > 0 ? alpha[u.token_at(u.tokens - 1)] : kLogZero);
}

// What a frame gives a thread's blank and token.
struct Emission {
  float blank, token;
};

// The token y_i, or the blank where there is none: something that can be read.
__device__ __forceinline__ int64_t token_of(const Utterance& u, int i) {
  return i < u.tokens ? u.target[i] : u.blank;
}

__device__ __forceinline__ Emission emission(const Utterance& u, int64_t t, int64_t token) {
  const float* x = u.log_probs + t * u.vocabulary;
  return {x[u.blank], x[token]};
}

// Whether a path may go from token i - 1 to token i.
__device__ __forceinline__ bool may_skip(const Utterance& u, int i) {
  return i > 0 && i < u.tokens && u.target[i] != u.target[i - 1];
}

// ---- the forward
__global__ void __launch_bounds__(kMostThreads, 1) alpha_kernel(const Forward p) {
  extern __shared__ float shared_rows[];
  const Problem& d = p.problem;
  const int64_t b = blockIdx.x, width = d.positions();
  float* log_alpha = static_cast<float*>(p.log_alpha) + b * d.frames * width;
  float* loss = static_cast<float*>(p.loss) + b;
  if (!in_range(d, b)) {
    fill(log_alpha, d.frames * width, NAN);
    if (threadIdx.x == 0) *loss = NAN;
    return;
  }
  const Utterance u = make_utterance(d, b);
  float* rows = p.rows == nullptr ? shared_rows : p.rows + b * 2 * width;
  const int first = threadIdx.x, threads = blockDim.x;
  const int64_t first_token = token_of(u, first);
  const bool first_skips = may_skip(u, first);

  for (int i = first; i < width; i += threads) rows[i] = i == u.blank_at(0) ? 0.f : kLogZero;
  __syncthreads();
  Emission ahead[kAhead];
  auto read = [&](int64_t t0) {
#pragma unroll
    for (int k = 0; k < kAhead; k++)
      ahead[k] = t0 + k < u.frames ? emission(u, t0 + k, first_token) : Emission{};
  };
  read(0);
  for (int64_t t0 = 0; t0 < u.frames; t0 += kAhead) {
    Emission group[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; k++) group[k] = ahead[k];
    read(t0 + kAhead);
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      const int64_t t = t0 + k;
      if (t >= u.frames) break;
      const float* before = rows + (t & 1) * width;
      float *now = rows + (1 - (t & 1)) * width, *out = log_alpha + t * width;
      for (int i = first; i <= u.row; i += threads) {
        float blank = kLogZero, token = kLogZero;
        if (i <= u.tokens) {
          const bool is_first = i == first;
          const Emission e = is_first ? group[k] : emission(u, t, token_of(u, i));
          const float token_before = i > 0 ? before[u.token_at(i - 1)] : kLogZero;
          blank = log_sum(before[u.blank_at(i)], token_before) + e.blank;
          if (i < u.tokens) {
            const bool skips = is_first ? first_skips : may_skip(u, i);
            token = log_sum(before[u.token_at(i)], before[u.blank_at(i)],
                            skips ? token_before : kLogZero) +
                    e.token;
          }
        }
        now[u.blank_at(i)] = out[u.blank_at(i)] = blank;
        if (i < u.row) now[u.token_at(i)] = out[u.token_at(i)] = token;
      }
      __syncthreads();
    }
  }
  fill(log_alpha + u.frames * width, (d.frames - u.frames) * width, kLogZero);
  if (threadIdx.x == 0) {
    const float value = 0.f - log_likelihood(u, rows + (u.frames & 1) * width);
    *loss = value == INFINITY ? 0.f : value;
  }
}

// ---- the backward
// For each token of the target, the next one that is the same.
__device__ void link_tokens(const Utterance& u, Link* links) {
  for (int i = threadIdx.x; i < u.tokens; i += blockDim.x) {
    const int64_t token = u.target[i];
    int before = i - 1, next = i + 1;
    while (before >= 0 && u.target[before] != token) before--;
    while (next < u.tokens && u.target[next] != token) next++;
    links[i] = {next, before < 0 && token != u.blank};
  }
}

// What a thread reads of a frame.
struct Frame {
  Emission emission;
  float alpha_blank, alpha_token;
};

__device__ __forceinline__ Frame read_frame(const Utterance& u, const float* log_alpha,
                                            int64_t width, int64_t t, int i, int64_t token) {
  if (i > u.tokens) return {};
  const float* alpha = log_alpha + t * width;
  return {emission(u, t, token), alpha[u.blank_at(i)],
          i < u.tokens ? alpha[u.token_at(i)] : kLogZero};
}

__global__ void __launch_bounds__(kMostThreads) beta_kernel(const Backward p) {
  extern __shared__ float shared_rows[];
  const Problem& d = p.problem;
  const int64_t b = blockIdx.x, width = d.positions();
  const bool fits = in_range(d, b);
  float log_p = NAN;
  int64_t gradients = d.frames;
  if (fits) {
    const Utterance u = make_utterance(d, b);
    const float* last =
        static_cast<const float*>(p.log_alpha) + (b * d.frames + u.frames - 1) * width;
    log_p = u.frames > 0 ? log_likelihood(u, last) : kLogZero;
    gradients = log_p == kLogZero ? 0 : u.frames;
  }
  if (threadIdx.x == 0) {
    p.gradients[b] = gradients;
    p.scales[b] = isnan(log_p) ? NAN : static_cast<const float*>(p.grad_loss)[b];
  }
  if (gradients == 0 || isnan(log_p)) return;

  const Utterance u = make_utterance(d, b);
  const float* log_alpha = static_cast<const float*>(p.log_alpha) + b * d.frames * width;
  float* posteriors = p.posteriors + b * d.frames * width;
  float* rows = p.rows == nullptr ? shared_rows : p.rows + b * 2 * width;
  const int first = threadIdx.x, threads = blockDim.x;
  const int64_t first_token = token_of(u, first);
  const bool first_skips = may_skip(u, first + 1);

  link_tokens(u, p.links + b * d.tokens);
  float* end = rows + (u.frames & 1) * width;
  for (int i = first; i < width; i += threads) end[i] = i == u.blank_at(u.tokens) ? 0.f : kLogZero;
  __syncthreads();
  Frame ahead[kAhead];
  auto read = [&](int64_t t0) {
#pragma unroll
    for (int k = 0; k < kAhead; k++)
      ahead[k] =
          t0 - k >= 0 ? read_frame(u, log_alpha, width, t0 - k, first, first_token) : Frame{};
  };
  read(u.frames - 1);
  for (int64_t t0 = u.frames - 1; t0 >= 0; t0 -= kAhead) {
    Frame group[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; k++) group[k] = ahead[k];
    read(t0 - kAhead);
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      const int64_t t = t0 - k;
      if (t < 0) break;
      const float* later = rows + (1 - (t & 1)) * width;
      float *now = rows + (t & 1) * width, *out = posteriors + t * width;
      for (int i = first; i <= u.tokens; i += threads) {
        const bool is_first = i == first;
        const Frame f = is_first ? group[k] : read_frame(u, log_alpha, width, t, i, token_of(u, i));
        const float token_later = i < u.tokens ? later[u.token_at(i)] : kLogZero;
        float onward = log_sum(later[u.blank_at(i)], token_later);
        now[u.blank_at(i)] = onward + f.emission.blank;
        out[u.blank_at(i)] = expf(f.alpha_blank + onward - log_p);
        if (i < u.tokens) {
          const bool skips = is_first ? first_skips : may_skip(u, i + 1);
          onward = log_sum(token_later, later[u.blank_at(i + 1)],
                           skips ? later[u.token_at(i + 1)] : kLogZero);
          now[u.token_at(i)] = onward + f.emission.token;
          out[u.token_at(i)] = expf(f.alpha_token + onward - log_p);
        }
      }
      __syncthreads();
    }
  }
}

// The sum over all threads of the block, in the first thread. What all wrote before is seen after.
__device__ float block_sum(float x) {
  __shared__ float of_warps[kGradientThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = add_lane_xor(x, offset);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kGradientThreads / kWarp; warp++) sum += of_warps[warp];
  return sum;
}

__global__ void __launch_bounds__(kGradientThreads) gradient_kernel(const Backward p) {
  const Problem& d = p.problem;
  const int64_t frame = blockIdx.x, b = frame / d.frames, t = frame % d.frames;
  float* grad = static_cast<float*>(p.grad_log_probs) + frame * d.vocabulary;
  const float scale = p.scales[b];
  if (t >= p.gradients[b]) return fill(grad, d.vocabulary, 0.f);
  if (isnan(scale)) return fill(grad, d.vocabulary, NAN);  // lengths and tokens may be any then

  const Utterance u = make_utterance(d, b);
  const float *x = u.log_probs + t * d.vocabulary,
              *posterior = p.posteriors + frame * d.positions();
  const Link* links = p.links + b * d.tokens;
  for (int64_t c = threadIdx.x; c < d.vocabulary; c += blockDim.x) grad[c] = expf(x[c]) * scale;
  float blanks = 0.f;
  for (int i = threadIdx.x; i <= u.tokens; i += blockDim.x) {
    blanks += posterior[u.blank_at(i)];
    if (i < u.tokens && u.target[i] == d.blank) blanks += posterior[u.token_at(i)];
  }
  blanks = block_sum(blanks);
  if (threadIdx.x == 0) grad[d.blank] = (expf(x[d.blank]) - blanks) * scale;
  for (int i = threadIdx.x; i < u.tokens; i += blockDim.x) {
    if (!links[i].first) continue;
    float sum = 0.f;
    for (int j = i; j < u.tokens; j = links[j].next) sum += posterior[u.token_at(j)];
    const int64_t c = u.target[i];
    grad[c] = (expf(x[c]) - sum) * scale;
  }
}

// ---- launches
void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sb_fast_sligru: a kernel did not launch: ") +
                             cudaGetErrorString(error));
}

int64_t row_bytes(int64_t positions) { return 2 * positions * sizeof(float); }

// A thread for each blank, if they are not too many.
int utterance_threads(const Problem& d) {
  const int64_t needed = ceil_div(d.tokens + 1, kWarp) * kWarp;
  return static_cast<int>(needed < kMostThreads ? needed : kMostThreads);
}

template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& p, cudaStream_t stream) {
  const Problem& d = p.problem;
  const size_t shared = p.rows == nullptr ? row_bytes(d.positions()) : 0;
  kernel<<<static_cast<unsigned>(d.batch), utterance_threads(d), shared, stream>>>(p);
  check(cudaGetLastError());
}

}  // namespace

bool rows_fit(int64_t positions) { return row_bytes(positions) <= kSharedBytes; }

void forward(const Forward& p, void* stream) {
  launch(alpha_kernel, p, static_cast<cudaStream_t>(stream));
}

void backward(const Backward& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  launch(beta_kernel, p, s);
  const int64_t frames = p.problem.batch * p.problem.frames;
  gradient_kernel<<<static_cast<unsigned>(frames), kGradientThreads, 0, s>>>(p);
  check(cudaGetLastError());
}

}  // namespace sb_fast_sligru::ctc_loss::cuda
