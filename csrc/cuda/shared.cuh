// Shared memory: one dynamic allocation a block, carved by the kernels; 16-byte aligned.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

namespace twostep::cuda {

#ifdef TWOSTEP_SIMT

inline unsigned char* shared_memory() { return simt::shared_memory(); }

template <class V>
inline V shared_load(const V* from) {
  simt::shared_read(from, sizeof(V));
  return *from;
}

template <class V>
inline void shared_store(V* to, V value) {
  simt::shared_write(to, sizeof(V));
  *to = value;
}

#else

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

template <class V>
__device__ inline V shared_load(const V* from) {
  return *from;
}

template <class V>
__device__ inline void shared_store(V* to, V value) {
  *to = value;
}

#endif

// Waits until at most `newer` of this thread's committed copy groups are in flight. The instruction takes a
// constant; the branch is uniform over the launch.
__device__ inline void wait_for_copies(int newer) {
  switch (newer) {
    case 0: return __pipeline_wait_prior(0);
    case 1: return __pipeline_wait_prior(1);
    case 2: return __pipeline_wait_prior(2);
    case 3: return __pipeline_wait_prior(3);
    default: return __pipeline_wait_prior(4);
  }
}

constexpr int max_copies_ahead = 4;

}  // namespace twostep::cuda
