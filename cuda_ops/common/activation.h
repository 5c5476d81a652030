// The activations: one struct each, with its value, its gradient, its name and, for float on the
// device, a fast form of both without the standard library's slow paths.
//
// To add one: an enumerator, its struct, its place in kActivations and in with_activation(), and a
// line in sb_fast_sligru/reference. Host code is compiled with -Werror=switch.
#pragma once

#include <cmath>

#include "common/types.h"
#ifdef __CUDACC__
#include "common/elementary.cuh"
#endif

namespace sb_fast_sligru {

enum class Activation { kRelu, kTanh, kSin, kLeakyRelu };

constexpr Activation kActivations[] = {Activation::kRelu, Activation::kTanh, Activation::kSin,
                                       Activation::kLeakyRelu};

struct Relu {
  static constexpr const char* kName = "relu";

  template <class T>
  static SLIGRU_HD T value(T a) {
    return a < T(0) ? T(0) : a;  // not max(a, 0): NaN must pass, as in torch
  }
  template <class T>
  static SLIGRU_HD T gradient(T a) {
    return a > T(0) ? T(1) : T(0);
  }
#ifdef __CUDACC__
  static __device__ __forceinline__ float fast_value(float a) { return value(a); }
  static __device__ __forceinline__ float fast_gradient(float a) { return gradient(a); }
#endif
};

struct Tanh {
  static constexpr const char* kName = "tanh";

  template <class T>
  static SLIGRU_HD T value(T a) {
    return std::tanh(a);
  }
  template <class T>
  static SLIGRU_HD T gradient(T a) {
    const T tanh_a = std::tanh(a);
    return T(1) - tanh_a * tanh_a;
  }
#ifdef __CUDACC__
  static __device__ __forceinline__ float fast_value(float a) { return fast_tanh(a); }
  static __device__ __forceinline__ float fast_gradient(float a) {
    const float tanh_a = fast_tanh(a);
    return fmaf(-tanh_a, tanh_a, 1.f);
  }
#endif
};

struct Sin {
  static constexpr const char* kName = "sin";

  template <class T>
  static SLIGRU_HD T value(T a) {
    return std::sin(a);
  }
  template <class T>
  static SLIGRU_HD T gradient(T a) {
    return std::cos(a);
  }
#ifdef __CUDACC__
  static __device__ __forceinline__ float fast_value(float a) { return fast_sine(a); }
  static __device__ __forceinline__ float fast_gradient(float a) { return fast_cosine(a); }
#endif
};

struct LeakyRelu {
  static constexpr const char* kName = "leaky_relu";
  static constexpr double kSlope = 0.01;  // torch.nn.LeakyReLU's

  template <class T>
  static SLIGRU_HD T value(T a) {
    return a < T(0) ? T(kSlope) * a : a;
  }
  template <class T>
  static SLIGRU_HD T gradient(T a) {
    return a > T(0) ? T(1) : T(kSlope);
  }
#ifdef __CUDACC__
  static __device__ __forceinline__ float fast_value(float a) { return value(a); }
  static __device__ __forceinline__ float fast_gradient(float a) { return gradient(a); }
#endif
};

// Calls f with the struct of an activation that is known at run time only.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f may be a lambda of the device's
#endif
template <class F>
SLIGRU_HD decltype(auto) with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(Relu{});
    case Activation::kTanh:
      return f(Tanh{});
    case Activation::kSin:
      return f(Sin{});
    case Activation::kLeakyRelu:
      return f(LeakyRelu{});
  }
  __builtin_unreachable();
}

inline const char* name_of(Activation activation) {
  return with_activation(activation, [](auto act) { return decltype(act)::kName; });
}

#ifdef __CUDACC__
// In the time loops. ReLU is tested first: a chain of tests costs it a hundredth of a step.
__device__ __forceinline__ float fast_activate(Activation activation, float a) {
  if (activation == Activation::kRelu) return Relu::fast_value(a);
  return with_activation(activation, [a](auto act) { return act.fast_value(a); });
}

__device__ __forceinline__ float fast_activation_gradient(Activation activation, float a) {
  return with_activation(activation, [a](auto act) { return act.fast_gradient(a); });
}
#endif

}  // namespace sb_fast_sligru
