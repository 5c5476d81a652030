// Times the persistent kernels alone, without torch: microseconds a time step of each launch, on
// random inputs. The figures of benchmarks/NOTEBOOK.md.
//
//   make build/bench_step
//   build/bench_step [PART]
//
// PART of a space and a case's label, such as "float32, H = 512" or " Li-GRU", chooses cases. With
// SB_FAST_SLIGRU_MAX_CLUSTER=1 the kernels without clusters run (cuda_ops/README.md).
//
// `build/bench_step small [PART]` launches the kernels once on small inputs and prints a checksum
// of what they computed: for compute-sanitizer, under which it must be the same (`make sanitize`).
// racecheck slows some warps down by far, and so shows races between the blocks of a cluster, which
// it does not see itself. Without torch, since the tools do not see all stores of cuBLAS, and
// racecheck ends at some of its kernels; its products are random numbers here.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "light_gru/persistent/persistent.h"

using namespace sb_fast_sligru;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Device memory until the end of the case.
class Arena {
 public:
  ~Arena() {
    for (void* pointer : pointers_) cudaFree(pointer);
  }
  void* take(size_t bytes) {
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, bytes));
    pointers_.push_back(pointer);
    return pointer;
  }
  float* floats(size_t count) { return static_cast<float*>(take(4 * count)); }

 private:
  std::vector<void*> pointers_;
};

__device__ float uniform(uint64_t i) {  // in [-1, 1)
  i = (i + 1) * 0x9E3779B97F4A7C15ull;
  i = (i ^ (i >> 29)) * 0xBF58476D1CE4E5B9ull;
  return static_cast<float>(i >> 40) * (1.f / 8388608.f) - 1.f;
}

__global__ void fill(void* data, DType type, size_t count, float scale) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const float x = uniform(i) * scale;
    if (type == DType::kFloat32)
      static_cast<float*>(data)[i] = x;
    else if (type == DType::kBFloat16)
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(__float_as_uint(x) >> 16);
    else
      static_cast<__half*>(data)[i] = __float2half(x);
  }
}

// Keeps the GPU busy until the host has queued what is to be timed.
__global__ void spin(int64_t cycles) {
  const int64_t start = clock64();
  while (clock64() - start < cycles) {
  }
}

struct Case {
  const char* name;
  int batch, directions, steps, hidden, chunk;
  bool layer_norm = true;
  DType operand = DType::kBFloat16;
  DType h = DType::kBFloat16;
  Activation activation = Activation::kRelu;
  bool float_wx = false;

  DType wx() const { return float_wx ? DType::kFloat32 : operand; }
};

std::string label(const Case& c) {
  return std::string(c.name) + ", H = " + std::to_string(c.hidden) + ", " +
         std::to_string(c.batch * c.directions) + " rows";
}

size_t bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// Median of `launches`, after one that is not counted if there are several.
template <class Launch>
double microseconds(int launches, const Launch& launch) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  std::vector<float> times;
  if (launches > 1) check(launch());
  for (int i = 0; i < launches; i++) {
    spin<<<1, 1>>>(200000);
    check(cudaEventRecord(start));
    check(launch());
    check(cudaEventRecord(stop));
    check(cudaEventSynchronize(stop));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, stop));
    times.push_back(1e3f * milliseconds);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// FNV-1a over the bytes of device memory.
uint64_t checksum(const void* data, size_t count, uint64_t sum) {
  std::vector<uint8_t> values(count);
  check(cudaMemcpy(values.data(), data, count, cudaMemcpyDeviceToHost));
  for (const uint8_t value : values) sum = (sum ^ value) * 0x100000001B3ull;
  return sum;
}

void run(const Case& c, bool small) {
  const int launches = small ? 1 : 7;
  Arena arena;
  const auto random = [&](DType type, size_t count, float scale) {
    void* data = arena.take(bytes(type) * count);
    fill<<<1024, 256>>>(data, type, count, scale);
    return data;
  };
  const size_t rows = size_t{1} * c.batch * c.directions, hidden = c.hidden;
  const size_t tokens = size_t{1} * c.batch * c.steps, row_steps = rows * c.chunk;
  const size_t size = bytes(c.operand);

  Recurrence layer = {};
  layer.batch = c.batch, layer.time = c.steps, layer.hidden = c.hidden;
  layer.directions = c.directions;
  layer.layer_norm = c.layer_norm, layer.eps = 1e-5, layer.activation = c.activation;
  layer.wx_type = c.wx(), layer.operand_type = c.operand, layer.output_type = c.h;
  layer.wx = random(c.wx(), tokens * 2 * hidden, 2.f);
  layer.wx_batch_stride = int64_t{2} * c.hidden * c.steps, layer.wx_time_stride = 2 * c.hidden;
  layer.drop_mask = random(DType::kFloat32, rows * hidden, 1.f);

  const auto exchange = [&](const KernelChoice& choice, Direction direction) {
    const int64_t needed = exchange_bytes(choice, layer, direction);
    return needed > 0 ? arena.take(needed) : nullptr;
  };

  PersistentForward forward = {};
  forward.layer = layer;
  forward.u = random(c.operand, 2 * hidden * hidden, 1.8f / std::max(c.hidden / 16, 1));
  forward.h = arena.take(tokens * c.directions * hidden * bytes(c.h));
  forward.rho = c.layer_norm ? arena.floats(rows * c.steps) : nullptr;
  forward.choice = choose(hidden, rows, c.operand, Direction::kForward, current_gpu());
  forward.exchange = exchange(forward.choice, Direction::kForward);

  PersistentBackward backward = {};
  backward.layer = layer;
  backward.u = forward.u, backward.h = forward.h, backward.rho = forward.rho;
  backward.choice = choose(hidden, rows, c.operand, Direction::kBackward, current_gpu());
  backward.exchange = exchange(backward.choice, Direction::kBackward);
  const size_t padded = backward.choice.padded_hidden();
  if (const int64_t packed = packed_bytes(backward.choice.kernel)) {
    const auto* u = static_cast<const float*>(forward.u);
    forward.u = arena.take(packed), backward.u = arena.take(packed);
    check(pack_forward(u, const_cast<void*>(forward.u), c.hidden, nullptr));
    check(pack_backward(u, nullptr, const_cast<void*>(backward.u), c.hidden, nullptr));
  }
  backward.first = c.steps - c.chunk, backward.count = c.chunk;
  backward.grad_h = random(c.h, tokens * c.directions * hidden, 1.f);
  backward.grad_h_time_stride = c.directions * c.hidden;
  backward.grad_h_batch_stride = backward.grad_h_time_stride * c.steps;
  backward.dwx = arena.take(tokens * 2 * hidden * bytes(c.wx()));
  backward.carry = static_cast<float*>(random(DType::kFloat32, rows * hidden, 0.f));
  backward.h_previous = arena.take(size * row_steps * hidden);
  backward.projection = static_cast<float*>(random(DType::kFloat32, 3 * row_steps * hidden, 0.3f));
  backward.coefficients = arena.take(size * row_steps * coefficient_streams(c.layer_norm) * padded);
  backward.dwx_rows = arena.take(size * row_steps * 2 * padded);
  backward.m2 = c.layer_norm ? arena.floats(row_steps) : nullptr;
  backward.dr = arena.take(size * row_steps * 2 * hidden);

  const auto step = [=](int steps, const auto& launch) {
    return microseconds(launches, launch) / steps;
  };
  const double times[5] = {step(c.steps, [&] { return run_forward(forward, nullptr); }),
                           step(c.chunk, [&] { return gather_h_previous(backward, nullptr); }),
                           step(c.chunk, [&] { return prepare_backward(backward, nullptr); }),
                           step(c.chunk, [&] { return run_backward(backward, nullptr); }),
                           step(c.chunk, [&] { return finish_backward(backward, nullptr); })};
  if (small) {
    const size_t row_bytes = c.layer_norm ? 4 * row_steps : 0;  // of rho and m2
    uint64_t sum = checksum(forward.h, bytes(c.h) * row_steps * hidden, 0xCBF29CE484222325ull);
    sum = checksum(forward.rho, row_bytes, sum), sum = checksum(backward.m2, row_bytes, sum);
    sum = checksum(backward.dwx, bytes(c.wx()) * tokens * 2 * hidden, sum);
    sum = checksum(backward.carry, 4 * rows * hidden, sum);
    sum = checksum(backward.dr, size * row_steps * 2 * hidden, sum);
    std::printf("%s: %016llx\n", label(c).c_str(), static_cast<unsigned long long>(sum));
    return;
  }
  std::printf("%-26s %4zu %5d %5d %5d  %7.3f %7.3f  %7.3f %7.3f %7.3f  %s, %s\n", c.name, rows,
              c.hidden, c.steps, c.chunk, times[0], times[3], times[1], times[2], times[4],
              name_of(forward.choice.kernel), name_of(backward.choice.kernel));
}

// Chunks as persistent/sweep.h takes them, or about so.
const std::vector<Case> kTimed = {
    {"SLi-GRU bfloat16", 16, 1, 1000, 512, 250},
    {"SLi-GRU bfloat16", 16, 1, 4000, 512, 1000},
    {"SLi-GRU float16", 16, 1, 4000, 512, 1000, true, DType::kFloat16, DType::kFloat16},
    {"bfloat16, float h", 16, 1, 4000, 512, 1000, true, DType::kBFloat16, DType::kFloat32},
    {"bfloat16, float wx and h", 16, 1, 4000, 512, 1000, true, DType::kBFloat16, DType::kFloat32,
     Activation::kRelu, true},
    {"SLi-GRU bfloat16, tanh", 16, 1, 4000, 512, 1000, true, DType::kBFloat16, DType::kBFloat16,
     Activation::kTanh},
    {"Li-GRU bfloat16", 16, 1, 4000, 512, 1000, false},
    {"SLi-GRU bfloat16", 28, 2, 1000, 512, 250},
    {"SLi-GRU bfloat16", 24, 2, 400, 1024, 400},
    {"SLi-GRU bfloat16", 24, 2, 1600, 1024, 400},
    {"SLi-GRU float16", 24, 2, 1600, 1024, 400, true, DType::kFloat16, DType::kFloat16},
    {"bfloat16, float h", 24, 2, 1600, 1024, 400, true, DType::kBFloat16, DType::kFloat32},
    {"bfloat16, float wx and h", 24, 2, 1600, 1024, 400, true, DType::kBFloat16, DType::kFloat32,
     Activation::kRelu, true},
    {"Li-GRU bfloat16", 24, 2, 1600, 1024, 400, false},
    {"SLi-GRU bfloat16", 28, 2, 400, 1024, 400},
    {"SLi-GRU bfloat16", 60, 2, 400, 1024, 300},
    {"SLi-GRU bfloat16", 120, 2, 400, 1024, 150},
    {"SLi-GRU float16", 120, 2, 400, 1024, 150, true, DType::kFloat16, DType::kFloat16},
    {"bfloat16, float h", 120, 2, 400, 1024, 150, true, DType::kBFloat16, DType::kFloat32},
    {"bfloat16, float wx and h", 120, 2, 400, 1024, 150, true, DType::kBFloat16, DType::kFloat32,
     Activation::kRelu, true},
    {"Li-GRU bfloat16", 120, 2, 400, 1024, 150, false},
    {"SLi-GRU bfloat16", 140, 2, 400, 1024, 130},
    {"SLi-GRU bfloat16", 240, 2, 200, 1024, 75},
    {"SLi-GRU bfloat16", 32, 1, 400, 2048, 400},
    {"SLi-GRU float16", 32, 1, 400, 2048, 400, true, DType::kFloat16, DType::kFloat16},
    {"Li-GRU bfloat16", 32, 1, 400, 2048, 400, false},
    {"SLi-GRU bfloat16", 16, 1, 4000, 256, 1000},
    {"SLi-GRU bfloat16", 60, 1, 4000, 256, 1000},
    {"SLi-GRU bfloat16", 16, 1, 4000, 128, 1000},
    {"SLi-GRU float32", 16, 1, 1000, 512, 500, true, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 16, 1, 4000, 512, 500, true, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32, tanh", 16, 1, 4000, 512, 500, true, DType::kFloat32, DType::kFloat32,
     Activation::kTanh},
    {"Li-GRU float32", 16, 1, 4000, 512, 500, false, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 28, 1, 1000, 512, 500, true, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 28, 2, 1000, 512, 500, true, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 16, 1, 4000, 256, 500, true, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 16, 1, 4000, 128, 500, true, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 24, 2, 400, 1024, 400, true, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 24, 2, 1600, 1024, 400, true, DType::kFloat32, DType::kFloat32},
    {"Li-GRU float32", 24, 2, 1600, 1024, 400, false, DType::kFloat32, DType::kFloat32},
    {"SLi-GRU float32", 120, 2, 400, 1024, 100, true, DType::kFloat32, DType::kFloat32}};

// Kernels of every size in both cells, with ReLU, the last cluster partly filled; those of the wide
// forward kernel for other types and activations.
std::vector<Case> small_cases() {
  struct Type {
    const char* sligru;
    const char* ligru;
    DType type;
  };
  std::vector<Case> cases;
  for (const auto& [sligru, ligru, type] :
       {Type{"SLi-GRU bfloat16", "Li-GRU bfloat16", DType::kBFloat16},
        Type{"SLi-GRU float16", "Li-GRU float16", DType::kFloat16},
        Type{"SLi-GRU float32", "Li-GRU float32", DType::kFloat32}})
    for (const bool layer_norm : {true, false}) {
      const char* name = layer_norm ? sligru : ligru;
      for (const int hidden : {72, 200, 512})
        cases.push_back({name, 5, 1, 4, hidden, 4, layer_norm, type, type});
      cases.push_back({name, 9, 1, 4, 1024, 4, layer_norm, type, type});
      if (type != DType::kFloat32) {  // kernels for more rows
        cases.push_back({name, 17, 2, 4, 264, 4, layer_norm, type, type});
        cases.push_back({name, 86, 2, 4, 1016, 4, layer_norm, type, type});
        cases.push_back({name, 9, 1, 4, 2040, 4, layer_norm, type, type});
      }
    }
  cases.push_back({"bfloat16, float h", 9, 1, 4, 1024, 4, true, DType::kBFloat16, DType::kFloat32});
  for (const int hidden : {512, 1024})
    cases.push_back({"bfloat16, float wx and h", 9, 1, 4, hidden, 4, true, DType::kBFloat16,
                     DType::kFloat32, Activation::kTanh, true});
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::strcmp(argv[1], "small") == 0;
  const char* part = argc > 1 + small ? argv[1 + small] : "";
  const auto run_chosen = [&](const std::vector<Case>& cases) {
    for (const Case& c : cases)
      if ((" " + label(c)).find(part) != std::string::npos) run(c, small);
  };
  if (small) {
    run_chosen(small_cases());
    return 0;
  }
  cudaDeviceProp device = {};
  check(cudaGetDeviceProperties(&device, 0));
  std::printf("%s; us a step, launch included\n", device.name);
  std::printf("%-26s %4s %5s %5s %5s  %7s %7s  %7s %7s %7s\n", "", "rows", "H", "T", "chunk",
              "forward", "backward", "gather", "prepare", "finish  kernels");
  run_chosen(kTimed);
  return 0;
}
