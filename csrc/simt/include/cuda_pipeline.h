// Stands in for CUDA's header when kernels are compiled for the host.
#pragma once

#include "../simt.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes) {
  ::simt::copy_async(shared, global, bytes);
}
inline void __pipeline_commit() { ::simt::commit_copies(); }
inline void __pipeline_wait_prior(size_t newer) { ::simt::wait_copies(newer); }
