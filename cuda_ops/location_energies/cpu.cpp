// The energies on the CPU; location_energies.h has the mathematics. Threads have kFrames frames of an
// utterance at a time. Of those they take kUnits units at a time for all frames of a hypothesis: what
// all frames share then stays in the first-level cache, and their keys in the second.
#include <vector>

#include "common/cpu_loops.h"
#include "location_energies/location_energies.h"

namespace sb_fast_sligru::location_energies::cpu {
namespace {

using namespace sb_fast_sligru::cpu;

constexpr int64_t kFrames = 64, kUnits = 256;

// f[g, t] of the frames from `begin` on, through a window of the last weights.
template <class T>
SLIGRU_HD void locate(const Energies& p, int64_t hypothesis, int64_t begin, int64_t count,
                      T* window, T* features) {
  const int64_t first = begin - p.taps / 2, size = count + p.taps - 1;
  const int64_t low = std::clamp<int64_t>(-first, 0, size),
                high = std::clamp<int64_t>(p.frames - first, low, size);
  const T* last = at<T>(p.last, hypothesis * p.frames);
  std::fill(window, window + low, T(0));
  std::copy(last + first + low, last + first + high, window + low);
  std::fill(window + high, window + size, T(0));
  std::fill(features, features + p.channels * kFrames, T(0));
  for (int64_t g = 0; g < p.channels; ++g)
    add_rows(window, 1, at<T>(p.filters, g * p.taps), 1, p.taps, count, features + g * kFrames);
}

// Adds what `units` units from `unit` on have to the energies of `count` frames; `weights` is the
// transpose of W_f, [G, A].
template <class T>
SLIGRU_HD void add_units(const Energies& p, const T* keys, const T* query, const T* weights,
                         const T* features, int64_t unit, int64_t units, int64_t count, T* s,
                         T* energies) {
  const T* v = at<T>(p.v, unit);
  for (int64_t t = 0; t < count; ++t) {
    const T* key = keys + t * p.units + unit;
#pragma omp simd
    for (int64_t j = 0; j < units; ++j) s[j] = key[j] + query[unit + j];
    add_rows(weights + unit, p.units, features + t, kFrames, p.channels, units, s);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < units; ++j) sum += v[j] * tanh(s[j]);
    energies[t] += sum;
  }
}

template <class T>
SLIGRU_HD void energies_range(const Energies& p, const void* transposed, int64_t begin,
                              int64_t end) {
  const int64_t chunks = ceil_div(p.frames, kFrames), beam = p.beam();
  std::vector<T> scratch(kFrames + p.taps + p.channels * kFrames + kUnits);
  T *window = scratch.data(), *features = window + kFrames + p.taps,
    *s = features + p.channels * kFrames;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t utterance = item / chunks, first = item % chunks * kFrames,
                  count = std::min(kFrames, p.frames - first);
    const T* keys = at<T>(p.keys, (utterance * p.frames + first) * p.units);
    for (int64_t n = utterance * beam; n < (utterance + 1) * beam; ++n) {
      locate(p, n, first, count, window, features);
      T* energies = at<T>(p.energies, n * p.frames + first);
      std::fill(energies, energies + count, T(0));
      for (int64_t unit = 0; unit < p.units; unit += kUnits)
        add_units(p, keys, at<T>(p.query, n * p.units), static_cast<const T*>(transposed), features,
                  unit, std::min(kUnits, p.units - unit), count, s, energies);
    }
  }
}

VECTOR_CLONES
void energies_float(const Energies& p, const void* transposed, int64_t begin, int64_t end) {
  energies_range<float>(p, transposed, begin, end);
}
VECTOR_CLONES
void energies_double(const Energies& p, const void* transposed, int64_t begin, int64_t end) {
  energies_range<double>(p, transposed, begin, end);
}

template <class T>
std::vector<T> transposed_weights(const Energies& p) {
  std::vector<T> transposed(p.channels * p.units);
  const T* weights = at<T>(p.w_location, 0);
  for (int64_t j = 0; j < p.units; ++j)
    for (int64_t g = 0; g < p.channels; ++g)
      transposed[g * p.units + j] = weights[j * p.channels + g];
  return transposed;
}

template <class T, class F>
void run(const Energies& p, const F& kernel) {
  const std::vector<T> weights = transposed_weights<T>(p);
  for_rows(0, p.batch * ceil_div(p.frames, kFrames), kFrames * p.beam() * p.units,
           [&](int64_t begin, int64_t end) { kernel(p, weights.data(), begin, end); });
}

}  // namespace

void energies(const Energies& p) {
  p.operand_type == DType::kFloat64 ? run<double>(p, energies_double)
                                    : run<float>(p, energies_float);
}

}  // namespace sb_fast_sligru::location_energies::cpu
