// How the blocks of a thread-block cluster talk to each other: the only such code of the library.
//
// A message is an st.async, or a bulk copy: a store into the shared memory of another block of the
// cluster that, when it lands, also subtracts its bytes from the transaction count of an mbarrier
// of that block. The receiver declares the bytes of a whole round of messages with expect() and
// sleeps in wait().
//
// Memory order
// - Data before flag. The landing of a message is a release on the mbarrier, and wait() acquires:
//   whoever returns from wait() sees every byte of the round. wait() acquires at the scope of the
//   block, as NVIDIA's own libraries do for data that other blocks send: what is read then lies in
//   the block's own shared memory, of which there are no copies. At the scope of the cluster,
//   which the letter of the memory model asks for, it would invalidate the L1 cache every time,
//   and with it slow the copies of wx and other streams down (benchmarks/NOTEBOOK.md).
// - Re-use of a buffer. A buffer is never written while a block may still read it, because each
//   round is sent only after a later round has been received in full from every block of the
//   cluster, and every block sends that later round after its last read of the buffer: its warps
//   meet at a __syncthreads, or each of them sends a part to every block. (A part to some is not
//   enough: the others then do not know of that warp.) Each kernel states which rounds play that
//   role.
// - Re-arming. Thread 0 calls expect() for the next use of an mbarrier right after its own wait(),
//   hence before its block sends anything that allows another block to start that next round.
//   (Where messages are early all the same, the phase cannot complete without expect().)
// - Life time. No block leaves before cluster_barrier(), which follows its last wait().
// The bytes declared and the bytes sent are derived from the same constants: were they to differ,
// the kernel would hang.
#pragma once

#include <cstdint>

// Clusters and st.async exist from compute capability 9.0 on; for older targets the kernels that
// use them are empty, and nothing launches those.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SB_FAST_SLIGRU_HAS_CLUSTERS 1
#else
#define SB_FAST_SLIGRU_HAS_CLUSTERS 0
#endif

namespace sb_fast_sligru {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Address, valid in the whole cluster, of `address` (in this block's shared memory) in block
// `rank`.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

namespace mbarrier {

// One arrival a phase: the expect() (or arrive()) of thread 0.
__device__ __forceinline__ void init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Makes init() visible to the other blocks; a cluster_barrier() has to follow.
__device__ __forceinline__ void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Completes a phase that expects no message.
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace mbarrier

// Store 4, 8 or 16 bytes at `address` of the block to which `address` and `barrier` belong.
__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, uint32_t x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
      "r"(x), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, uint32_t x, uint32_t y) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
          address),
      "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, uint32_t x, uint32_t y,
                                     uint32_t z, uint32_t w) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}

// Copy `bytes` (a multiple of 16) of this block's shared memory to `address` of the block to which
// `address` and `barrier` belong. A message too; one thread sends it. What other instructions wrote
// there needs a fence_async() of the writer first.
__device__ __forceinline__ void send_bulk(uint32_t address, uint32_t barrier, uint32_t from,
                                          uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(address),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Makes this thread's writes to shared memory visible to bulk copies and warpgroup products, which
// go by another path.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace sb_fast_sligru
