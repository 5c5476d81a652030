// What the operator reads and writes, as plain pointers: the contract between the files that see
// tensors (operator.cpp, operator_cuda.cpp) and those that compute (cpu.cpp, kernels.cu). No torch
// headers.
//
// Adadelta (Zeiler 2012, Algorithm 1) with the options of PyTorch's. Of each parameter x with
// gradient g, the averages v of its squared gradients and u of its squared steps:
//
//   g <- g + weight_decay x          of -g, if g is to be climbed
//   v <- rho v + (1 - rho) g^2
//   d  = sqrt(u + eps) / sqrt(v + eps) g
//   u <- rho u + (1 - rho) d^2
//   x <- x - lr d
//
// Four numbers are read and three written for each parameter: the update is bound by memory, so it is
// one pass over all of it. Which parameters are neighbours does not matter, nor does their shape.
#pragma once

#include <cmath>
#include <vector>

#include "common/types.h"

namespace sb_fast_sligru::adadelta {

// A tensor of parameters and what belongs to it, in the same order of memory, without gaps.
struct Parameters {
  int64_t size;
  float* x;
  const float* grad;
  float* square_avg;  // v
  float* acc_delta;   // u
};

// a b + c, on a GPU always rounded once: its compiler would choose anew for each loop.
SLIGRU_HD float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// a b + c d. On a CPU too the compiler fuses the addition with the first product where it can.
SLIGRU_HD float sum_of_products(float a, float b, float c, float d) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, __fmul_rn(c, d));
#else
  return a * b + c * d;
#endif
}

struct Rule {
  float lr, rho, rest;  // rest = 1 - rho, rounded once
  float eps, weight_decay;
  float sign;  // of the gradient

  SLIGRU_HD void update(float& x, float grad, float& square_avg, float& acc_delta) const {
    const float signed_grad = sign * grad;
    // Without decay, an infinite parameter is none of the gradient.
    const float g = weight_decay != 0.f ? multiply_add(weight_decay, x, signed_grad) : signed_grad;
    // The squares' rounding counts at first, when the averages are 0.
    square_avg = sum_of_products(rest * g, g, rho, square_avg);
    const float d = sqrtf(acc_delta + eps) / sqrtf(square_avg + eps) * g;
    acc_delta = sum_of_products(rest * d, d, rho, acc_delta);
    x = multiply_add(-lr, d, x);
  }
};

namespace cpu {
void update(const Rule& rule, const std::vector<Parameters>& tensors);
}

namespace cuda {  // on the current device; throws std::runtime_error if a launch fails
void update(const Rule& rule, const std::vector<Parameters>& tensors, void* stream);
}

}  // namespace sb_fast_sligru::adadelta
