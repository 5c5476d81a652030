// Library _C_cuda: the CUDA implementation of the ops that operator.cpp declares, on the caller's
// device and stream, and one query of its own:
//
// persistent_obstacle  why the persistent backend cannot take a layer of this size on this device,
//                      or "" if it can
#include <cstdlib>
#include <map>
#include <mutex>

#include "light_gru/centre.h"
#include "light_gru/persistent/persistent.h"
#include "light_gru/sweep.h"

namespace sb_fast_sligru {
namespace {

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess,
                  "sb_fast_sligru: a kernel did not launch: ", cudaGetErrorString(error));
}

// A [2H, H] matrix less its column mean.
Tensor centred(const Tensor& matrix, ScalarType type, cudaStream_t stream) {
  const int64_t hidden = matrix.size(1);
  const Tensor out = new_empty(matrix, {2 * hidden, hidden}, type);
  check_launch(centre_columns(matrix.const_data_ptr(), dtype_of(matrix.scalar_type()),
                              out.mutable_data_ptr(), dtype_of(type), hidden, stream));
  return out;
}

// U as the products read it: centred when a LayerNorm follows, in the operand type.
Tensor recurrent_operand(const Inputs& in, cudaStream_t stream) {
  return in.layer_norm ? centred(in.u, in.operand_type, stream)
                       : torch::stable::to(in.u, in.operand_type);
}

struct CudaSteps {
  static constexpr bool kTransposedProduct = false;
  static constexpr int64_t kChunkBytes = int64_t{64} << 20;

  cudaStream_t stream;

  Tensor recurrent_operand(const Inputs& in) const {
    return sb_fast_sligru::recurrent_operand(in, stream);
  }

  void forward_step(const ForwardStep& p, int64_t step) const {
    stepwise::forward_step(p, step, stream);
  }
  void gather_previous(const GatherPrevious& p) const { stepwise::gather_previous(p, stream); }
  void backward_step(const BackwardStep& p, int64_t step) const {
    stepwise::backward_step(p, step, stream);
  }
  void finish_carry(const FinishCarry& p) const { stepwise::finish_carry(p, stream); }
};

// The device of a tensor made current, and the stream that the caller set on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// ------------------------------------------------------------------------------------ persistent

// The persistent kernels read 16 bytes at a time.
Tensor aligned(const Tensor& t) {
  constexpr int64_t kBytes = 16;
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2, last = t.dim() - 1;
  bool fits = t.stride(last) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kBytes == 0;
  for (int64_t axis = 0; axis < last; ++axis) fits = fits && t.stride(axis) * size % kBytes == 0;
  return fits ? t : torch::stable::clone(torch::stable::contiguous(t));
}

Inputs aligned(Inputs in) {
  in.wx = aligned(in.wx);
  in.u = aligned(in.u);
  for (OptionalTensor* t : {&in.h0, &in.drop_mask, &in.ln_weight, &in.ln_bias})
    if (t->has_value()) *t = aligned(**t);
  return in;
}

// U as the sequential kernels read it; `pack` is called where that is not as it is.
template <class Pack>
Tensor kernel_operand(const Inputs& in, const Tensor& u, Pack pack) {
  const int64_t bytes = packed_bytes(in.hidden(), dtype_of(in.operand_type));
  if (bytes == 0) return u;
  const Tensor packed = new_empty(u, {bytes}, ScalarType::Byte);
  check_launch(pack(u.const_data_ptr<float>(), packed.mutable_data_ptr()));
  return packed;
}

std::tuple<Tensor, Tensor> persistent_forward(const Inputs& in, cudaStream_t stream) {
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  Tensor h = new_empty(in.wx, {in.batch(), T, in.directions() * H}, in.u.scalar_type());
  Tensor rho = new_empty(in.wx, {in.layer_norm ? R : 0, T}, ScalarType::Float);
  if (R == 0 || T == 0) return {h, rho};
  const Tensor u = kernel_operand(
      in, recurrent_operand(in, stream),
      [&](const float* centred, void* packed) { return pack_forward(centred, packed, H, stream); });
  check_launch(run_forward({in.recurrence(), u.const_data_ptr(), h.mutable_data_ptr(),
                            in.layer_norm ? rho.mutable_data_ptr<float>() : nullptr},
                           stream));
  return {h, rho};
}

// [Uc; Uc^T Uc]: one product with h_{t-1} then gives r and what removes the mean of dy xh from the
// carry (backward_narrow.cu). Without a LayerNorm the latter is not needed.
Tensor projection_operand(const Inputs& in, const Tensor& u) {
  if (!in.layer_norm) return u;
  const int64_t H = in.hidden();
  const Tensor gram = new_empty(u, {H, H}, ScalarType::Float);
  multiply(torch::stable::transpose(u, 0, 1), u, gram);
  Tensor both = new_empty(u, {3 * H, H}, in.operand_type);
  Tensor upper = torch::stable::narrow(both, 0, 0, 2 * H);
  Tensor lower = torch::stable::narrow(both, 0, 2 * H, H);
  torch::stable::copy_(upper, u);
  torch::stable::copy_(lower, gram);
  return both;
}

Gradients persistent_backward(const Inputs& in, const Tensor& grad_h_in, const Tensor& h,
                              const Tensor& rho, Needs needs, cudaStream_t stream) {
  // A launch of the sequential kernel costs about as much as 20 steps, once for every wave of its
  // clusters: chunks of at least kChunkSteps, unless those need more than kMostBytes.
  constexpr int64_t kChunkBytes = int64_t{224} << 20, kMostBytes = int64_t{1} << 30;
  constexpr int64_t kChunkSteps = 400;
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  const bool ln = in.layer_norm, need_ln = needs.ln && ln;
  const ScalarType fp32 = ScalarType::Float;
  auto nothing = [&] { return new_empty(in.wx, {0}, fp32); };
  Tensor grad_wx = new_empty(in.wx, {in.batch(), T, 2 * H}, in.wx.scalar_type());
  Tensor grad_h0 = new_zeros(in.wx, {R, H}, fp32);
  // Sums over the chunks; the first chunk's part is the first sum.
  const bool empty = R == 0 || T == 0;
  Tensor grad_u = needs.u && empty ? new_zeros(in.wx, {2 * H, H}, fp32) : nothing();
  Tensor grad_ln = need_ln && empty ? new_zeros(in.wx, {4 * H}, fp32) : nothing();

  if (!empty) {
    const Tensor grad_h = aligned(grad_h_in), u = recurrent_operand(in, stream);
    const Tensor w_t = torch::stable::transpose(projection_operand(in, u), 0, 1);
    const auto* ln_weight = static_cast<const float*>(pointer(in.ln_weight));
    const Tensor kernel_u = kernel_operand(in, u, [&](const float* centred, void* packed) {
      return pack_backward(centred, ln_weight, packed, H, stream);
    });
    const int64_t width = w_t.size(1), padded = padded_hidden(H);
    const int64_t streams = coefficient_streams(ln);
    const int64_t operand_bytes = in.operand_type == fp32 ? 4 : 2;
    const int64_t bytes_per_step =
        R * (4 * width + operand_bytes * (H + streams * padded + 2 * padded));
    const int64_t bytes =
        std::clamp<int64_t>(kChunkSteps * bytes_per_step, kChunkBytes, kMostBytes);
    const int64_t chunk = std::clamp<int64_t>(bytes / bytes_per_step, 1, T);

    // The kernels see dense arrays of the chunk's own length, so the shorter chunk takes a front
    // part.
    auto buffer = [&](int64_t elements, ScalarType type) {
      return new_empty(in.wx, {elements}, type);
    };
    const Tensor h_previous = buffer(R * chunk * H, in.operand_type);
    const Tensor projection = buffer(R * chunk * width, fp32);
    const Tensor coefficients = buffer(R * chunk * streams * padded, in.operand_type);
    const Tensor dwx_rows = buffer(R * chunk * 2 * padded, in.operand_type);
    const Tensor& dr = coefficients;  // written when those have been read, and smaller
    const Tensor m2 = ln ? buffer(R * chunk, fp32) : nothing();
    const Tensor affine = need_ln ? buffer(affine_partials(R, chunk) * 4 * H, fp32) : nothing();
    auto front = [](Tensor t, int64_t rows, int64_t columns) {
      std::vector<int64_t> sizes{rows, columns};
      return torch::stable::view(torch::stable::narrow(t, 0, 0, rows * columns), sizes);
    };

    for (int64_t end = T; end > 0; end -= chunk) {
      const int64_t begin = std::max<int64_t>(end - chunk, 0), count = end - begin, n = R * count;
      const auto add = [&](Tensor& sum, const Tensor& part) {
        sum = end == T ? part : torch::stable::subtract(sum, part, -1.0);
      };
      const PersistentBackward p{in.recurrence(),
                                 kernel_u.const_data_ptr(),
                                 begin,
                                 count,
                                 h.const_data_ptr(),
                                 ln ? rho.const_data_ptr<float>() : nullptr,
                                 grad_h.const_data_ptr(),
                                 grad_h.stride(0),
                                 grad_h.stride(1),
                                 grad_wx.mutable_data_ptr(),
                                 grad_h0.mutable_data_ptr<float>(),
                                 h_previous.mutable_data_ptr(),
                                 projection.mutable_data_ptr<float>(),
                                 coefficients.mutable_data_ptr(),
                                 dwx_rows.mutable_data_ptr(),
                                 ln ? m2.mutable_data_ptr<float>() : nullptr,
                                 dr.mutable_data_ptr(),
                                 need_ln ? affine.mutable_data_ptr<float>() : nullptr};
      check_launch(gather_h_previous(p, stream));
      multiply(front(h_previous, n, H), w_t, front(projection, n, width));
      check_launch(prepare_backward(p, stream));
      check_launch(run_backward(p, stream));
      check_launch(finish_backward(p, stream));
      if (needs.u) {
        const Tensor part = new_empty(in.wx, {2 * H, H}, fp32);
        multiply(torch::stable::transpose(front(dr, n, 2 * H), 0, 1), front(h_previous, n, H),
                 part);
        add(grad_u, part);
      }
      if (need_ln) {
        add(grad_ln, sum_rows(front(affine, affine_partials(R, count), 4 * H)));
      }
    }
  }
  if (needs.u) {
    const ScalarType type = in.u.scalar_type();
    grad_u = ln ? centred(grad_u, type, stream) : torch::stable::to(grad_u, type);
  }
  // Copies, so that the two gradients share no memory.
  auto half = [&](int64_t begin) {
    return need_ln ? torch::stable::clone(torch::stable::narrow(grad_ln, 0, begin, 2 * H))
                   : nothing();
  };
  return {needs.wx ? grad_wx : new_empty(in.wx, {0}, in.wx.scalar_type()), grad_u,
          needs.h0 ? grad_h0 : nothing(), half(0), half(2 * H)};
}

// Null if the persistent kernels take the layer, else why not. The driver is asked once a device
// and size, not in every call.
const char* obstacle(int64_t hidden, ScalarType operand_type, int64_t device_index) {
  STD_TORCH_CHECK(largest_cluster() > 0, "SB_FAST_SLIGRU_MAX_CLUSTER: got \"",
                  std::getenv("SB_FAST_SLIGRU_MAX_CLUSTER"), "\", expected a number from 1 to ",
                  kLargestCluster);
  static std::mutex mutex;
  static std::map<std::tuple<int64_t, ScalarType, int64_t>, const char*> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = answers.try_emplace({hidden, operand_type, device_index});
  if (is_new) {
    const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device_index));
    entry->second = persistent_plan(hidden, dtype_of(operand_type)).reason;
  }
  return entry->second;
}

std::string persistent_obstacle(int64_t hidden, ScalarType operand_dtype, int64_t device_index) {
  const char* reason = obstacle(hidden, operand_dtype, device_index);
  return reason == nullptr ? "" : reason;
}

// ------------------------------------------------------------------------------------------- ops

// True for "persistent", false for "stepwise"; anything else, or a layer that does not fit, throws.
bool use_persistent(const std::string& backend, const Inputs& in) {
  STD_TORCH_CHECK(backend == "stepwise" || backend == "persistent", "backend: got \"", backend,
                  "\", expected \"stepwise\" or \"persistent\" for tensors on a CUDA device");
  if (backend == "stepwise") return false;
  const char* reason = obstacle(in.hidden(), in.operand_type, in.wx.get_device_index());
  STD_TORCH_CHECK(reason == nullptr, "backend: \"persistent\" cannot take this layer: ", reason);
  return true;
}

std::tuple<Tensor, Tensor> light_gru_cuda(const Tensor& wx, const Tensor& u, OptionalTensor h0,
                                          OptionalTensor drop_mask, OptionalTensor ln_weight,
                                          OptionalTensor ln_bias, bool layer_norm, double eps,
                                          std::string activation, bool bidirectional,
                                          ScalarType operand_dtype, std::string backend) {
  const OnDeviceOf device(wx);
  const Inputs in = check_inputs(wx, u, h0, drop_mask, ln_weight, ln_bias, layer_norm, eps,
                                 activation, bidirectional, operand_dtype);
  if (!use_persistent(backend, in)) return forward_sweep(in, CudaSteps{device.stream()});
  return persistent_forward(aligned(in), device.stream());
}

Gradients light_gru_backward_cuda(const Tensor& grad_h, const Tensor& wx, const Tensor& u,
                                  OptionalTensor h0, OptionalTensor drop_mask,
                                  OptionalTensor ln_weight, OptionalTensor ln_bias, bool layer_norm,
                                  double eps, std::string activation, bool bidirectional,
                                  ScalarType operand_dtype, std::string backend, const Tensor& h,
                                  const Tensor& rho, bool need_wx, bool need_u, bool need_h0,
                                  bool need_ln) {
  const OnDeviceOf device(wx);
  const Inputs in = check_inputs(wx, u, h0, drop_mask, ln_weight, ln_bias, layer_norm, eps,
                                 activation, bidirectional, operand_dtype);
  check_saved(in, grad_h, h, rho, u.scalar_type());
  const Needs needs{need_wx, need_u, need_h0, need_ln};
  if (!use_persistent(backend, in)) {
    return backward_sweep(in, grad_h, h, rho, needs, CudaSteps{device.stream()});
  }
  return persistent_backward(aligned(in), grad_h, h, rho, needs, device.stream());
}

}  // namespace
}  // namespace sb_fast_sligru

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def("persistent_obstacle(int hidden, ScalarType operand_dtype, int device_index) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CompositeExplicitAutograd, m) {
  m.impl("persistent_obstacle", TORCH_BOX(&sb_fast_sligru::persistent_obstacle));
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  m.impl("light_gru", TORCH_BOX(&sb_fast_sligru::light_gru_cuda));
  m.impl("light_gru_backward", TORCH_BOX(&sb_fast_sligru::light_gru_backward_cuda));
}
