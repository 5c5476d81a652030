// Backend "stepwise": the element kernels of recurrence.h on any CUDA GPU, for any hidden size and
// dtype. The time loop in sweep.h issues one matrix product and one of these kernels a step; the
// equations are those of cell.h.
//
// Layout: one block a row, its threads stride over the H hidden units; thread j owns unit j of the
// candidate and of the gate, so only the row's sum (LayerNorm statistics, or its gradient's
// projection) crosses threads. It is reduced in a fixed order, without atomics: same input, same
// bits. Rows keep the layer's order: only the GPU knows how many sequences have ended.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/convert.cuh"
#include "light_gru/recurrence.h"

namespace sb_fast_sligru::stepwise {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <class T>
__device__ __forceinline__ T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// Sum over the block; every thread receives it. The order of additions is fixed.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T partial[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) sum += partial[w];
  return sum;
}

template <class T>
__device__ __forceinline__ T value_or(const void* base, int64_t index, T otherwise) {
  return base == nullptr ? otherwise : static_cast<const T*>(base)[index];
}

// y = LayerNorm's affine part of xh = rho r for one gate value; plain r for Li-GRU.
template <class T>
__device__ __forceinline__ T affine(const Recurrence& layer, T xh, int64_t j) {
  return xh * value_or<T>(layer.ln_weight, j, T(1)) + value_or<T>(layer.ln_bias, j, T(0));
}

template <class Wx, class Operand, class Output, class Acc>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardStep p, int64_t step) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden, row = blockIdx.x;
  if (step >= layer.length_of(row)) return;
  const int64_t b = row % layer.batch, direction = row / layer.batch, t = layer.time_of(row, step);
  const Acc* r = static_cast<const Acc*>(p.r) + row * p.r_row_stride;
  Acc rho = 1;
  if (layer.layer_norm) {
    Acc squares = 0;
    for (int64_t j = threadIdx.x; j < 2 * H; j += kThreads) squares += r[j] * r[j];
    squares = block_sum(squares);
    rho = Acc(1) / sqrt(squares / Acc(2 * H) + Acc(layer.eps));
    if (threadIdx.x == 0) static_cast<Acc*>(p.rho)[row * layer.time + t] = rho;
  }
  const Wx* wx = static_cast<const Wx*>(layer.wx) +
                 layer.element_of(b, t, layer.wx_batch_stride, layer.wx_time_stride);
  Acc* state = static_cast<Acc*>(p.state) + row * H;
  Operand* operand = static_cast<Operand*>(p.operand) + row * H;
  Output* h = static_cast<Output*>(p.h) + (layer.frame_of(b, t) * layer.directions + direction) * H;
  for (int64_t j = threadIdx.x; j < H; j += kThreads) {
    const Acc a = widen(wx[j]) + affine(layer, r[j] * rho, j);
    const Acc z = sigmoid(widen(wx[H + j]) + affine(layer, r[H + j] * rho, H + j));
    const Acc value = with_activation(layer.activation, [a](auto act) { return act.value(a); });
    const Acc c = value * value_or<Acc>(layer.drop_mask, row * H + j, Acc(1));
    const Acc next = next_hidden(state[j], z, c);
    state[j] = next;
    operand[j] = narrow<Operand>(next);
    h[j] = narrow<Output>(next);
  }
}

template <class Operand, class Output, class Acc>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherPrevious p) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden, row = blockIdx.x % p.rows;
  const int64_t step = p.first_step + blockIdx.x / p.rows;
  Operand* previous = static_cast<Operand*>(p.previous) + blockIdx.x * H;
  if (step == 0 || step >= layer.length_of(row)) {
    const void* h0 = step == 0 ? layer.h0 : nullptr;
    for (int64_t j = threadIdx.x; j < H; j += kThreads) {
      previous[j] = narrow<Operand>(value_or<Acc>(h0, row * H + j, Acc(0)));
    }
    return;
  }
  const int64_t b = row % layer.batch, direction = row / layer.batch,
                t = layer.time_of(row, step - 1);
  const Output* h =
      static_cast<const Output*>(p.h) + (layer.frame_of(b, t) * layer.directions + direction) * H;
  for (int64_t j = threadIdx.x; j < H; j += kThreads) previous[j] = narrow<Operand>(widen(h[j]));
}

template <class Wx, class Operand, class Output, class Acc>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BackwardStep p, int64_t step) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden, N = 2 * H, row = blockIdx.x;
  const int64_t b = row % layer.batch, direction = row / layer.batch;
  if (p.direction != BackwardStep::kBothDirections && p.direction != direction) return;
  const int64_t length = layer.length_of(row), t = layer.time_of(row, step);
  Operand* e = static_cast<Operand*>(p.e) + row * N;
  if (step >= length) {
    for (int64_t j = threadIdx.x; j < N; j += kThreads) e[j] = narrow<Operand>(Acc(0));
    return;
  }
  const int64_t towards_start = direction == 0 ? -1 : 1;  // from t to the time of h_{t-1}
  const Acc* rho_row = static_cast<const Acc*>(p.rho) + row * layer.time;
  const Acc rho = layer.layer_norm ? rho_row[t] : Acc(1);
  // base and product are zero before the first backward step; there is no later rho to read then.
  const Acc rho_next = layer.layer_norm && step < length - 1 ? rho_row[t - towards_start] : Acc(1);
  const Acc* r = static_cast<const Acc*>(p.r) + row * N;
  const Wx* wx = static_cast<const Wx*>(layer.wx) +
                 layer.element_of(b, t, layer.wx_batch_stride, layer.wx_time_stride);
  const Output* grad_h = static_cast<const Output*>(p.grad_h) +
                         layer.element_of(b, t, p.grad_h_batch_stride, p.grad_h_time_stride) +
                         direction * H;
  const Output* h_previous =
      static_cast<const Output*>(p.h) +
      (layer.frame_of(b, t + towards_start) * layer.directions + direction) * H;
  const Acc* product = static_cast<const Acc*>(p.product) + row * H;
  Acc* base = static_cast<Acc*>(p.base) + row * H;

  auto previous = [&](int64_t j) {
    return step == 0 ? value_or<Acc>(layer.h0, row * H + j, Acc(0)) : widen(h_previous[j]);
  };
  auto gradient = [&](int64_t j) {
    const Acc d = widen(grad_h[j]) + base[j] + rho_next * product[j];
    const Acc a = widen(wx[j]) + affine(layer, r[j] * rho, j);
    const Acc z = sigmoid(widen(wx[H + j]) + affine(layer, r[H + j] * rho, H + j));
    const Acc value = with_activation(layer.activation, [a](auto act) { return act.value(a); });
    const Acc slope = with_activation(layer.activation, [a](auto act) { return act.gradient(a); });
    return cell_gradient(d, previous(j), value, slope, z,
                         value_or<Acc>(layer.drop_mask, row * H + j, Acc(1)));
  };

  // dr = rho (dy - xh mean(dy xh)) with xh = rho r and dy = gamma dwx: mean(dy) drops out because
  // Uc is centred. rho waits until after the products, so that their 16-bit operands keep their
  // range.
  Acc factor = 0;
  if (layer.layer_norm) {
    Acc dot = 0;
    for (int64_t j = threadIdx.x; j < H; j += kThreads) {
      const CellGradient<Acc> g = gradient(j);
      dot += g.candidate * value_or<Acc>(layer.ln_weight, j, Acc(1)) * r[j] +
             g.gate * value_or<Acc>(layer.ln_weight, H + j, Acc(1)) * r[H + j];
    }
    factor = block_sum(dot) * rho / Acc(N) * rho;
  }

  // Two directions share wx: whichever comes to this time second adds to what the first wrote.
  const bool second =
      layer.directions == 2 && (direction == 0 ? t < length - 1 - t : t >= length - 1 - t);
  Wx* grad_wx =
      p.grad_wx == nullptr ? nullptr : static_cast<Wx*>(p.grad_wx) + layer.frame_of(b, t) * N;
  Acc* grad_ln_weight = static_cast<Acc*>(p.grad_ln_weight);
  Acc* grad_ln_bias = static_cast<Acc*>(p.grad_ln_bias);
  auto write = [&](int64_t j, Acc dwx) {
    if (grad_wx != nullptr) grad_wx[j] = narrow<Wx>(second ? widen(grad_wx[j]) + dwx : dwx);
    if (grad_ln_weight != nullptr) {
      grad_ln_weight[row * N + j] += dwx * (r[j] * rho);
      grad_ln_bias[row * N + j] += dwx;
    }
    e[j] = narrow<Operand>(dwx * value_or<Acc>(layer.ln_weight, j, Acc(1)) - factor * r[j]);
  };
  // The gates once more rather than 2H values kept in shared memory, which would bound H.
  for (int64_t j = threadIdx.x; j < H; j += kThreads) {
    const CellGradient<Acc> g = gradient(j);
    base[j] = g.direct;
    write(j, g.candidate);
    write(H + j, g.gate);
    if (p.scaled != nullptr)
      static_cast<Operand*>(p.scaled)[row * H + j] = narrow<Operand>(rho * previous(j));
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishCarry p) {
  const Recurrence& layer = p.layer;
  const int64_t H = layer.hidden, row = blockIdx.x;
  if (layer.length_of(row) == 0) return;  // h0 has no result to change
  const Acc rho = layer.layer_norm
                      ? static_cast<const Acc*>(p.rho)[row * layer.time + layer.time_of(row, 0)]
                      : Acc(1);
  for (int64_t j = row * H + threadIdx.x; j < (row + 1) * H; j += kThreads) {
    static_cast<Acc*>(p.grad_h0)[j] =
        static_cast<const Acc*>(p.base)[j] + rho * static_cast<const Acc*>(p.product)[j];
  }
}

// The dtype combinations that check_inputs admits: all alike, or 16-bit operands beside float32
// tensors.
template <class Half, class F>
void dispatch_half(const Recurrence& layer, const F& f) {
  if (layer.output_type != DType::kFloat32) {
    f(Half{}, Half{}, Half{}, float{});
  } else if (layer.wx_type != DType::kFloat32) {
    f(Half{}, Half{}, float{}, float{});
  } else {
    f(float{}, Half{}, float{}, float{});
  }
}

template <class F>
void dispatch(const Recurrence& layer, const F& f) {  // f(wx, operand, output, acc)
  switch (layer.operand_type) {
    case DType::kFloat64:
      return f(double{}, double{}, double{}, double{});
    case DType::kFloat32:
      return f(float{}, float{}, float{}, float{});
    case DType::kBFloat16:
      return dispatch_half<__nv_bfloat16>(layer, f);
    case DType::kFloat16:
      return dispatch_half<__half>(layer, f);
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, void* stream,
            const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("sb_fast_sligru: a stepwise kernel did not launch: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace

void forward_step(const ForwardStep& p, int64_t step, void* stream) {
  dispatch(p.layer, [&](auto wx, auto operand, auto output, auto acc) {
    launch(forward_kernel<decltype(wx), decltype(operand), decltype(output), decltype(acc)>, p.rows,
           stream, p, step);
  });
}

void gather_previous(const GatherPrevious& p, void* stream) {
  dispatch(p.layer, [&](auto, auto operand, auto output, auto acc) {
    launch(gather_kernel<decltype(operand), decltype(output), decltype(acc)>, p.steps * p.rows,
           stream, p);
  });
}

void backward_step(const BackwardStep& p, int64_t step, void* stream) {
  dispatch(p.layer, [&](auto wx, auto operand, auto output, auto acc) {
    launch(backward_kernel<decltype(wx), decltype(operand), decltype(output), decltype(acc)>,
           p.rows, stream, p, step);
  });
}

void finish_carry(const FinishCarry& p, void* stream) {
  if (p.layer.output_type == DType::kFloat64) {
    launch(finish_kernel<double>, p.layer.rows(), stream, p);
  } else {
    launch(finish_kernel<float>, p.layer.rows(), stream, p);
  }
}

}  // namespace sb_fast_sligru::stepwise
