// The element kernels of decoder.h on the CPU. Rows of the batch, or chunks of their frames, go to
// threads; the loops within are over units or frames and vectorised (common/cpu_loops.h).
#include <limits>
#include <vector>

#include "attention_decoder/decoder.h"
#include "common/cpu_loops.h"

namespace sb_fast_sligru::attention_decoder::cpu {
namespace {

using namespace sb_fast_sligru::cpu;

// So many multiply-adds cost about as much as a unit with its elementary functions: what is less
// work than a thread is worth (cpu_loops.h) stays with one.
constexpr int64_t kMultiplyAdds = 64;
constexpr int64_t kBlock = 16;  // frames whose ds are kept together, near the first-level cache

template <class T>
SLIGRU_HD T dot(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

// out[i * out_stride] = rows[i * row_stride + ...] . x
template <class T>
SLIGRU_HD void dot_rows(const T* rows, int64_t row_stride, const T* x, int64_t count, int64_t n,
                        T* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T *r0 = rows + i * row_stride, *r1 = r0 + row_stride, *r2 = r1 + row_stride,
            *r3 = r2 + row_stride;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < n; ++j) {
      s0 += r0[j] * x[j];
      s1 += r1[j] * x[j];
      s2 += r2[j] * x[j];
      s3 += r3[j] * x[j];
    }
    T* to = out + i * out_stride;
    to[0] = s0;
    to[out_stride] = s1;
    to[2 * out_stride] = s2;
    to[3 * out_stride] = s3;
  }
  for (; i < count; ++i) out[i * out_stride] = dot(rows + i * row_stride, x, n);
}

// The frames of an item that lie within the length of its row.
struct Frames {
  int64_t row, begin, count;

  Frames(const Decoder& d, int64_t item) {
    row = item / d.chunks();
    begin = item % d.chunks() * kFrames;
    count = std::clamp<int64_t>(d.lengths[row] - begin, 0, kFrames);
  }
};

// Location features of kFrames frames, f[g, l], from a window of the attention before `token`.
template <class T>
SLIGRU_HD void locate(const Decoder& d, const void* attention, int64_t token, const Frames& frames,
                      T* window, T* features) {
  const int64_t K = d.taps / 2, length = d.lengths[frames.row];
  const T* before = at<T>(attention, (frames.row * d.tokens + token - 1) * d.frames);
  const int64_t size = kFrames + d.padded_taps(), first = frames.begin - K;
  const int64_t low = std::clamp<int64_t>(-first, 0, size),
                high = std::clamp<int64_t>(d.frames - first, low, size);
  std::fill(window, window + size, T(0));
  if (token > 0) {
    std::copy(before + first + low, before + first + high, window + low);
  } else {
    const int64_t end = std::clamp<int64_t>(length - first, low, size);
    std::fill(window + low, window + end, T(1) / T(length));
  }
  std::fill(features, features + d.channels * kFrames, T(0));
  for (int64_t g = 0; g < d.channels; ++g)
    add_rows(window, 1, at<T>(d.filters, g * d.taps), 1, d.taps, kFrames, features + g * kFrames);
}

// s of one frame.
template <class T>
SLIGRU_HD void activations(const Decoder& d, const T* query, const Frames& frames, int64_t l,
                           const T* features, T* s) {
  const T* key = at<T>(d.keys, (frames.row * d.frames + frames.begin + l) * d.attention);
#pragma omp simd
  for (int64_t j = 0; j < d.attention; ++j) s[j] = key[j] + query[j];
  add_rows(at<T>(d.w_location, 0), d.attention, features + l, kFrames, d.channels, d.attention, s);
}

template <class T>
SLIGRU_HD void cell_range(const ForwardStep& p, int64_t token, int64_t begin, int64_t end) {
  const Decoder& d = p.decoder;
  const int64_t H = d.hidden;
  std::vector<T> scratch(4 * H, T(0));
  T *bias = scratch.data(), *zeros = bias + 3 * H;
  copy_or_fill(at<T>(d.u_bias, 0), T(0), 3 * H, bias);
  for (int64_t row = begin; row < end; ++row) {
    const T *wx = at<T>(d.wx, (row * d.tokens + token) * 3 * H),
            *input = at<T>(p.input, row * 3 * H), *recurrent = at<T>(p.recurrent, row * 3 * H);
    T* h = at<T>(p.h, (row * d.tokens + token) * H);
    const T* previous = token > 0 ? h - H : zeros;
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      const T r = sigmoid(wx[j] + input[j] + (recurrent[j] + bias[j]));
      const T z = sigmoid(wx[H + j] + input[H + j] + (recurrent[H + j] + bias[H + j]));
      const T n =
          tanh(wx[2 * H + j] + input[2 * H + j] + r * (recurrent[2 * H + j] + bias[2 * H + j]));
      h[j] = n + z * (previous[j] - n);
    }
  }
}

template <class T>
SLIGRU_HD void energies_range(const ForwardStep& p, int64_t token, int64_t begin, int64_t end) {
  const Decoder& d = p.decoder;
  std::vector<T> scratch(kFrames + d.padded_taps() + d.channels * kFrames + d.attention);
  T *window = scratch.data(), *features = window + kFrames + d.padded_taps(),
    *s = features + d.channels * kFrames;
  const T* v = at<T>(d.v, 0);
  for (int64_t item = begin; item < end; ++item) {
    const Frames frames(d, item);
    if (frames.count == 0) continue;
    locate(d, p.attention, token, frames, window, features);
    const T* query = at<T>(p.query, frames.row * d.attention);
    T* energies = at<T>(p.energies, frames.row * d.frames + frames.begin);
    for (int64_t l = 0; l < frames.count; ++l) {
      activations(d, query, frames, l, features, s);
      T energy = 0;
#pragma omp simd reduction(+ : energy)
      for (int64_t j = 0; j < d.attention; ++j) energy += v[j] * tanh(s[j]);
      energies[l] = energy;
    }
  }
}

template <class T>
SLIGRU_HD void attend_range(const ForwardStep& p, int64_t token, int64_t begin, int64_t end) {
  const Decoder& d = p.decoder;
  const T scaling = T(d.scaling);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t length = d.lengths[row];
    const T* energies = at<T>(p.energies, row * d.frames);
    T* attention = at<T>(p.attention, (row * d.tokens + token) * d.frames);
    // Frames beyond the length have the energy -inf. As in torch, NaN comes of a length of 0 and of
    // a scaling that is not positive.
    const T outside = -std::numeric_limits<T>::infinity() * scaling;
    T largest = length < d.frames ? outside : -std::numeric_limits<T>::infinity();
    for (int64_t l = 0; l < length; ++l) {
      const T energy = scaling * energies[l];
      largest = energy > largest ? energy : largest;
    }
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t l = 0; l < length; ++l) {
      attention[l] = exp_of_negative(scaling * energies[l] - largest);
      total += attention[l];
    }
    const T rest = length < d.frames ? exp_of_negative(outside - largest) : T(0);
    total += T(d.frames - length) * rest;
#pragma omp simd
    for (int64_t l = 0; l < length; ++l) attention[l] /= total;
    std::fill(attention + length, attention + d.frames, rest / total);

    T* summary = at<T>(p.summary, row * d.value);
    std::fill(summary, summary + d.value, T(0));
    add_rows(at<T>(d.values, row * d.frames * d.value), d.value, attention, 1, d.frames, d.value,
             summary);
  }
}

template <class T>
SLIGRU_HD void finish_context_range(const ForwardStep& p, int64_t token, int64_t begin,
                                    int64_t end) {
  const Decoder& d = p.decoder;
  const int64_t C = d.context;
  const T* bias = at<T>(d.b_out, 0);
  for (int64_t row = begin; row < end; ++row) {
    T *context = at<T>(p.context, (row * d.tokens + token) * C), *masked = at<T>(p.masked, row * C);
#pragma omp simd
    for (int64_t j = 0; j < C; ++j) masked[j] = context[j] = context[j] + bias[j];
    if (d.context_mask != nullptr && token + 1 < d.tokens) {
      const T* mask = at<T>(d.context_mask, (row * d.tokens + token + 1) * C);
#pragma omp simd
      for (int64_t j = 0; j < C; ++j) masked[j] *= mask[j];
    }
  }
}

template <class T>
SLIGRU_HD void gather_range(const GatherPrevious& p, int64_t begin, int64_t end) {
  const Decoder& d = p.decoder;
  const int64_t H = d.hidden, C = d.context;
  for (int64_t i = begin; i < end; ++i) {
    const bool first = i % d.tokens == 0;
    copy_or_fill(first ? nullptr : at<T>(p.h, (i - 1) * H), T(0), H, at<T>(p.previous, i * H));
    T* masked = at<T>(p.masked, i * C);
    copy_or_fill(first ? nullptr : at<T>(p.context, (i - 1) * C), T(0), C, masked);
    if (d.context_mask != nullptr && !first) {
      const T* mask = at<T>(d.context_mask, i * C);
#pragma omp simd
      for (int64_t j = 0; j < C; ++j) masked[j] *= mask[j];
    }
  }
}

template <class T>
SLIGRU_HD void backward_context_range(const BackwardStep& p, int64_t token, int64_t begin,
                                      int64_t end) {
  const Decoder& d = p.decoder;
  const int64_t C = d.context;
  std::vector<T> mask(C);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t place = (row * d.tokens + token) * C;
    T* context = at<T>(p.context, place);
    copy_or_fill(at<T>(p.grad_context, place), T(0), C, context);
    if (token + 1 < d.tokens) {
      copy_or_fill(at<T>(d.context_mask, place + C), T(1), C, mask.data());
      const T* carry = at<T>(p.input_carry, row * C);
#pragma omp simd
      for (int64_t j = 0; j < C; ++j) context[j] += mask[j] * carry[j];
    }
  }
}

template <class T>
SLIGRU_HD void backward_attention_range(const BackwardStep& p, int64_t token, int64_t begin,
                                        int64_t end) {
  const Decoder& d = p.decoder;
  for (int64_t item = begin; item < end; ++item) {
    const Frames frames(d, item);
    const T* summary = at<T>(p.summary, (frames.row * d.tokens + token) * d.value);
    const T* outside =
        at<T>(p.grad_attention, (frames.row * d.tokens + token) * d.frames + frames.begin);
    T* part = at<T>(p.attention_part, frames.row * d.frames + frames.begin);
    const T* values = at<T>(d.values, (frames.row * d.frames + frames.begin) * d.value);
    dot_rows(values, d.value, summary, frames.count, d.value, part, 1);
    if (outside != nullptr) {
      for (int64_t l = 0; l < frames.count; ++l) part[l] += outside[l];
    }
  }
}

template <class T>
SLIGRU_HD void backward_energies_range(const BackwardStep& p, int64_t token, int64_t begin,
                                       int64_t end) {
  const Decoder& d = p.decoder;
  const int64_t A = d.attention, taps = d.padded_taps(), size = d.channels * kFrames;
  std::vector<T> scratch(kFrames + taps + 2 * size + kFrames + A + kBlock * A);
  T *window = scratch.data(), *features = window + kFrames + taps, *grad_features = features + size,
    *grad_energies = grad_features + size, *unwanted = grad_energies + kFrames,
    *block = unwanted + A;  // s, then ds
  const T *v = at<T>(d.v, 0), *weights = at<T>(d.w_location, 0);
  for (int64_t item = begin; item < end; ++item) {
    const Frames frames(d, item);
    T* sums = at<T>(p.query_part, item * A);
    std::fill(sums, sums + A, T(0));
    if (frames.count == 0) continue;
    locate(d, p.attention, token, frames, window, features);
    std::fill(grad_features, grad_features + size, T(0));

    const int64_t place = (frames.row * d.tokens + token) * d.frames;
    const T *attention = at<T>(p.attention, place),
            *part = at<T>(p.attention_part, frames.row * d.frames);
    const T mean = dot(attention, part, d.lengths[frames.row]);
    for (int64_t l = 0; l < frames.count; ++l)
      grad_energies[l] =
          T(d.scaling) * attention[frames.begin + l] * (part[frames.begin + l] - mean);

    const T* query = at<T>(p.query, (frames.row * d.tokens + token) * A);
    T* grad_v = p.v == nullptr ? unwanted : at<T>(p.v, item * A);
    for (int64_t first = 0; first < frames.count; first += kBlock) {
      const int64_t count = std::min(kBlock, frames.count - first);
      for (int64_t i = 0; i < count; ++i) {
        T* s = block + i * A;
        activations(d, query, frames, first + i, features, s);
        const T grad_energy = grad_energies[first + i];
#pragma omp simd
        for (int64_t j = 0; j < A; ++j) {
          const TanhParts<T> y = tanh_parts(s[j]);
          grad_v[j] += grad_energy * y.value;
          s[j] = grad_energy * v[j] * y.slope;
          sums[j] += s[j];
        }
        T* key = at<T>(p.keys, (frames.row * d.frames + frames.begin + first + i) * A);
        if (key != nullptr) {
#pragma omp simd
          for (int64_t j = 0; j < A; ++j) key[j] += s[j];
        }
        if (p.filters != nullptr) {
          dot_rows(weights, A, s, d.channels, A, grad_features + first + i, kFrames);
        }
      }
      if (p.w_location != nullptr) {
        for (int64_t g = 0; g < d.channels; ++g)
          add_rows(block, A, features + g * kFrames + first, 1, count, A,
                   at<T>(p.w_location, (item * d.channels + g) * A));
      }
    }
    if (p.filters != nullptr) {
      for (int64_t g = 0; g < d.channels; ++g)
        add_rows(window, 1, grad_features + g * kFrames, 1, frames.count, taps,
                 at<T>(p.filters, (item * d.channels + g) * taps));
    }
  }
}

template <class T>
SLIGRU_HD void backward_query_range(const BackwardStep& p, int64_t token, int64_t begin,
                                    int64_t end) {
  const Decoder& d = p.decoder;
  const int64_t A = d.attention, chunks = d.chunks();
  for (int64_t row = begin; row < end; ++row) {
    T* sum = at<T>(p.query_gradient, (row * d.tokens + token) * A);
    std::fill(sum, sum + A, T(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const T* part = at<T>(p.query_part, (row * chunks + chunk) * A);
#pragma omp simd
      for (int64_t j = 0; j < A; ++j) sum[j] += part[j];
    }
  }
}

template <class T>
SLIGRU_HD void backward_cell_range(const BackwardStep& p, int64_t token, int64_t begin,
                                   int64_t end) {
  const Decoder& d = p.decoder;
  const int64_t H = d.hidden;
  std::vector<T> scratch(5 * H, T(0));
  T *bias = scratch.data(), *zeros = bias + 3 * H, *outside = zeros + H;
  copy_or_fill(at<T>(d.u_bias, 0), T(0), 3 * H, bias);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t place = (row * d.tokens + token) * H;
    const T *wx = at<T>(d.wx, 3 * place), *input = at<T>(p.input, 3 * place),
            *recurrent = at<T>(p.recurrent, 3 * place);
    const T *previous = token > 0 ? at<T>(p.h, place - H) : zeros,
            *hidden_part = at<T>(p.hidden_part, row * H), *carry = at<T>(p.hidden_carry, row * H);
    copy_or_fill(at<T>(p.grad_h, place), T(0), H, outside);
    T *di = at<T>(p.input_gradient, 3 * place), *dg = at<T>(p.recurrent_gradient, 3 * place),
      *base = at<T>(p.base, row * H);
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      const T g = recurrent[2 * H + j] + bias[2 * H + j];
      const T r = sigmoid(wx[j] + input[j] + (recurrent[j] + bias[j]));
      const T z = sigmoid(wx[H + j] + input[H + j] + (recurrent[H + j] + bias[H + j]));
      const TanhParts<T> n = tanh_parts(wx[2 * H + j] + input[2 * H + j] + r * g);
      const T dh = outside[j] + hidden_part[j] + (base[j] + carry[j]);
      const T dn = dh * (T(1) - z) * n.slope;
      const T dz = dh * (previous[j] - n.value) * z * (T(1) - z);
      const T dr = dn * g * r * (T(1) - r);
      di[j] = dg[j] = dr;
      di[H + j] = dg[H + j] = dz;
      di[2 * H + j] = dn;
      dg[2 * H + j] = dn * r;
      base[j] = dh * z;
    }
  }
}

template <class T>
SLIGRU_HD void sum_range(const void* rows, int64_t count, int64_t width, void* sums, int64_t begin,
                         int64_t end) {
  T* sum = at<T>(sums, 0);
  std::fill(sum + begin, sum + end, T(0));
  for (int64_t i = 0; i < count; ++i) {
    const T* row = at<T>(rows, i * width);
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) sum[j] += row[j];
  }
}

// The vectorised entry points: one a kernel and type.
#define STEP_CLONES(kernel, Step)                                                  \
  VECTOR_CLONES                                                                    \
  void kernel##_float(const Step& p, int64_t token, int64_t begin, int64_t end) {  \
    kernel##_range<float>(p, token, begin, end);                                   \
  }                                                                                \
  VECTOR_CLONES                                                                    \
  void kernel##_double(const Step& p, int64_t token, int64_t begin, int64_t end) { \
    kernel##_range<double>(p, token, begin, end);                                  \
  }

STEP_CLONES(cell, ForwardStep)
STEP_CLONES(energies, ForwardStep)
STEP_CLONES(attend, ForwardStep)
STEP_CLONES(finish_context, ForwardStep)
STEP_CLONES(backward_context, BackwardStep)
STEP_CLONES(backward_attention, BackwardStep)
STEP_CLONES(backward_energies, BackwardStep)
STEP_CLONES(backward_query, BackwardStep)
STEP_CLONES(backward_cell, BackwardStep)

VECTOR_CLONES
void sum_float(const void* rows, int64_t count, int64_t width, void* sums, int64_t begin,
               int64_t end) {
  sum_range<float>(rows, count, width, sums, begin, end);
}

VECTOR_CLONES
void sum_double(const void* rows, int64_t count, int64_t width, void* sums, int64_t begin,
                int64_t end) {
  sum_range<double>(rows, count, width, sums, begin, end);
}

template <class Step>
void run(const Step& p, int64_t token, int64_t count, int64_t elements,
         void (*in_float)(const Step&, int64_t, int64_t, int64_t),
         void (*in_double)(const Step&, int64_t, int64_t, int64_t)) {
  const auto kernel = p.decoder.type == DType::kFloat64 ? in_double : in_float;
  for_rows(0, count, elements, [&](int64_t begin, int64_t end) { kernel(p, token, begin, end); });
}

}  // namespace

void cell(const ForwardStep& p, int64_t token) {
  run(p, token, p.decoder.batch, 3 * p.decoder.hidden, cell_float, cell_double);
}

void energies(const ForwardStep& p, int64_t token) {
  const Decoder& d = p.decoder;
  run(p, token, d.items(), kFrames * d.attention, energies_float, energies_double);
}

void attend(const ForwardStep& p, int64_t token) {
  const Decoder& d = p.decoder;
  run(p, token, d.batch, d.frames * d.value / kMultiplyAdds, attend_float, attend_double);
}

void finish_context(const ForwardStep& p, int64_t token) {
  run(p, token, p.decoder.batch, p.decoder.context, finish_context_float, finish_context_double);
}

void gather_previous(const GatherPrevious& p) {
  const Decoder& d = p.decoder;
  for_rows(0, d.batch * d.tokens, d.hidden + d.context, [&](int64_t begin, int64_t end) {
    d.type == DType::kFloat64 ? gather_range<double>(p, begin, end)
                              : gather_range<float>(p, begin, end);
  });
}

void backward_context(const BackwardStep& p, int64_t token) {
  const Decoder& d = p.decoder;
  run(p, token, d.batch, d.context, backward_context_float, backward_context_double);
}

void backward_attention(const BackwardStep& p, int64_t token) {
  const Decoder& d = p.decoder;
  run(p, token, d.items(), kFrames * d.value / kMultiplyAdds, backward_attention_float,
      backward_attention_double);
}

void backward_energies(const BackwardStep& p, int64_t token) {
  const Decoder& d = p.decoder;
  run(p, token, d.items(), kFrames * d.attention, backward_energies_float,
      backward_energies_double);
}

void backward_query(const BackwardStep& p, int64_t token) {
  const Decoder& d = p.decoder;
  run(p, token, d.batch, d.chunks() * d.attention, backward_query_float, backward_query_double);
}

void backward_cell(const BackwardStep& p, int64_t token) {
  run(p, token, p.decoder.batch, 3 * p.decoder.hidden, backward_cell_float, backward_cell_double);
}

void sum_rows(DType type, const void* rows, int64_t count, int64_t width, void* sums) {
  for_rows(0, width, count, [&](int64_t begin, int64_t end) {
    type == DType::kFloat64 ? sum_double(rows, count, width, sums, begin, end)
                            : sum_float(rows, count, width, sums, begin, end);
  });
}

}  // namespace sb_fast_sligru::attention_decoder::cpu
