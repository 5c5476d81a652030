// What the operator reads and writes, as plain pointers: the contract between the files that see
// tensors (operator.cpp, operator_cuda.cpp) and those that compute (cpu.cpp, kernels.cu). No torch
// headers.
//
// The energies of location-aware attention (Chorowski et al. 2015, eq. 8 and 9) for hypotheses that
// share the keys of their utterance. Of hypothesis n of utterance b, at frame t, with G filters of
// W = 2K + 1 taps over its last weights p, which are 0 outside of the frames:
//
//   f[n, t, g] = sum_k F[g, k] p[n, t + k - K]
//   e[n, t]    = v . tanh(key[b, t] + query[n] + W_f f[n, t])
//
// Axes: B utterances, N hypotheses, N / B in a row for each utterance, T frames, A units. All tensors
// are contiguous. Operands are the keys and W_f; all else is as wide as the sums.
#pragma once

#include "common/types.h"

namespace sb_fast_sligru::location_energies {

struct Energies {
  int64_t batch, hypotheses, frames, units, channels, taps;
  DType operand_type;  // double or float on a CPU, 16 bits or float on a GPU

  const void* query;       // [N, A]
  const void* last;        // [N, T]: p
  const void* keys;        // operands [B, T, A]
  const void* filters;     // [G, W]
  const void* w_location;  // operands [A, G]: W_f
  const void* v;           // [A]
  void* energies;          // [N, T]

  SLIGRU_HD int64_t beam() const { return hypotheses / batch; }
};

namespace cpu {
void energies(const Energies& p);
}

namespace cuda {  // on the current device; throw std::runtime_error if the launch fails
int64_t blocks(const Energies& p);
void energies(const Energies& p, void* stream);
}  // namespace cuda

}  // namespace sb_fast_sligru::location_energies
