// log(1 + y) for probabilities that are kept as logarithms, on CPU and GPU.
#pragma once

#include "common/types.h"

namespace sb_fast_sligru {

// log(1 + y) of a y in [0, 1]: a polynomial, because a logarithm would be a call on a CPU and take
// the longest of a frame on a GPU. Absolute error 1.3e-7.
SLIGRU_HD float log1p_of_fraction(float y) {
  const float y2 = y * y, y4 = y2 * y2;
  const float a = 9.999999953e-01f - 4.999990242e-01f * y;
  const float b = 3.332996241e-01f - 2.495413359e-01f * y;
  const float c = 1.967593894e-01f - 1.530559166e-01f * y;
  const float d = 1.060365334e-01f - 5.695951904e-02f * y;
  const float e = 1.985145426e-02f - 3.244023379e-03f * y;
  return y * ((a + b * y2) + ((c + d * y2) + e * y4) * y4);
}

}  // namespace sb_fast_sligru
