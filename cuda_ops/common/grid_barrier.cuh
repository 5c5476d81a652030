// A barrier of all blocks of a cooperative launch, which run at once.
//
// Thread 0 of a block adds to a counter in global memory and waits until all blocks have: a release
// and an acquire at the scope of the GPU, so that what any thread wrote before is seen by all
// threads after. What blocks exchange is to be read past the L1 cache (__ldcg). About 1.3 us on an
// H200, whatever is exchanged.
#pragma once

#include <cstdint>

namespace sb_fast_sligru {

class GridBarrier {
 public:
  // `arrivals` is 0 when the kernel starts.
  __device__ explicit GridBarrier(uint32_t* arrivals) : arrivals_(arrivals) {}

  __device__ void wait() {
    __syncthreads();
    if (threadIdx.x == 0) {
      goal_ += gridDim.x;
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals_) : "memory");
      uint32_t seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(seen)
                     : "l"(arrivals_)
                     : "memory");
      } while (static_cast<int32_t>(seen - goal_) < 0);  // also where the counter wraps around
    }
    __syncthreads();
  }

 private:
  uint32_t* arrivals_;
  uint32_t goal_ = 0;
};

}  // namespace sb_fast_sligru
