// The gate algebra of one hidden unit, shared by every backend. Forward, given
// y = LayerNorm(U h_{t-1}) or U h_{t-1}:
//
//   a = wx_a + y_a;  z = sigmoid(wx_z + y_z);  c = act(a) * mask;  h_t = z h_{t-1} + (1 - z) c
//
// (Ravanelli et al. 2018, eq. 5 to 7; Moumen and Parcollet 2023, eq. 5.) Backward, given
// d = dL/dh_t:
//
//   da = d (1 - z) mask act'(a);  ds = d (h_{t-1} - c) z (1 - z);  d z flows on to h_{t-1} directly
//
// The normalisation uses a centred U: with Uc = U - columnmean(U) the mean of Uc h is zero, so
// LayerNorm(U h) = rho Uc h with rho = 1 / sqrt(mean((Uc h)^2) + eps): one reduction, no
// cancellation.
#pragma once

#include "common/activation.h"

namespace sb_fast_sligru {

template <class T>
SLIGRU_HD T next_hidden(T h_previous, T z, T c) {
  return c + z * (h_previous - c);
}

template <class T>
struct CellGradient {
  T candidate;  // dL/da
  T gate;       // dL/ds
  T direct;     // the part of dL/dh_{t-1} that does not pass through U
};

// value, slope: act(a), act'(a).
template <class T>
SLIGRU_HD CellGradient<T> cell_gradient(T d, T h_previous, T value, T slope, T z, T mask) {
  const T c = value * mask;
  return {d * (T(1) - z) * mask * slope, d * (h_previous - c) * z * (T(1) - z), d * z};
}

}  // namespace sb_fast_sligru
