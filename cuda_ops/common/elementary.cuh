// Elementary functions of float without the standard library's slow paths, for the time loops. The
// comments give the largest error, relative unless said otherwise.
#pragma once

namespace sb_fast_sligru {

__device__ __forceinline__ float reciprocal_sqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 2^-22
  return y;
}

__device__ __forceinline__ float fast_exponential(float x) {  // 2^-21
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_sigmoid(float x) {
  return reciprocal(1.f + fast_exponential(-x));
}

// Up to 1/2, where 1 - 2 / (1 + e^2x) cancels, by a polynomial; without a branch. 2^-21.
__device__ __forceinline__ float fast_tanh(float x) {
  const float x2 = x * x;
  float p = fmaf(1.72413588e-2f, x2, -5.30454442e-2f);
  p = fmaf(p, x2, 1.33258790e-1f);
  p = fmaf(p, x2, -3.33331436e-1f);
  const float small = fmaf(p * x2, x, x);
  const float large = fmaf(-2.f, reciprocal(1.f + fast_exponential(2.f * x)), 1.f);
  return fabsf(x) < 0.5f ? small : large;  // NaN: large
}

// sin(x) and cos(x) to 2^-23 absolute: the sine of what x is beyond a multiple (cosine: an odd
// multiple of a half) of pi, by a polynomial on [-pi/2, pi/2]. The hardware's sine has 2^-21; sinf
// would need a table in local memory for its largest arguments.
__device__ __forceinline__ float sine_beyond(float x, float half_turns, bool negative) {
  const float y = fmaf(half_turns, 8.74227766e-8f, fmaf(half_turns, -3.14159274f, x));
  const float y2 = y * y;
  float p = fmaf(2.60005459e-6f, y2, -1.98066147e-4f);
  p = fmaf(p, y2, 8.33301712e-3f);
  p = fmaf(p, y2, -0.166666567f);
  const float sine = fmaf(p * y2, y, y);
  return negative ? -sine : sine;
}

__device__ __forceinline__ float fast_sine(float x) {
  const float half_turns = rintf(x * 0.318309886f);
  return sine_beyond(x, half_turns, static_cast<int>(half_turns) & 1);
}

__device__ __forceinline__ float fast_cosine(float x) {
  const float half_turns = rintf(fmaf(x, 0.318309886f, -0.5f));
  return sine_beyond(x, half_turns + 0.5f, (static_cast<int>(half_turns) & 1) == 0);
}

}  // namespace sb_fast_sligru
