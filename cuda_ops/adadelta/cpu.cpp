// The update on the CPU; adadelta.h has the mathematics. Threads have a part of a tensor each.
#include "adadelta/adadelta.h"
#include "common/cpu_loops.h"

namespace sb_fast_sligru::adadelta::cpu {
namespace {

VECTOR_CLONES
void update_range(const Rule& rule, const Parameters& p, int64_t begin, int64_t end) {
  float *x = p.x, *square_avg = p.square_avg, *acc_delta = p.acc_delta;
  const float* grad = p.grad;
  const Rule r = rule;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) r.update(x[i], grad[i], square_avg[i], acc_delta[i]);
}

}  // namespace

void update(const Rule& rule, const std::vector<Parameters>& tensors) {
  for (const Parameters& tensor : tensors)
    sb_fast_sligru::cpu::for_rows(0, tensor.size, 1, [&](int64_t begin, int64_t end) {
      update_range(rule, tensor, begin, end);
    });
}

}  // namespace sb_fast_sligru::adadelta::cpu
