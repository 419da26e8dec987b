// Stands in for CUDA's header when kernels are compiled for the host: just what csrc uses of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../simt.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::simt::position().thread)
#define blockIdx (::simt::position().block)
#define blockDim (::simt::position().block_dim)
#define gridDim (::simt::position().grid_dim)
#define __syncthreads() ::simt::barrier(__FILE__, __LINE__)

using dim3 = ::simt::Dim3;
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ::simt::Settings& settings = ::simt::settings();
  *value = attribute == cudaDevAttrMultiProcessorCount            ? settings.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? settings.shared_per_block
                                                                  : settings.shared_per_multiprocessor;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// References to vectors must not be formed before the access is checked, so addresses are passed on as they are.
template <class V>
inline V __ldg(const V* from) {
  ::simt::global_read(from, sizeof(V));
  return *from;
}
template <class V>
inline V __ldcg(const V* from) {
  return __ldg(from);
}
template <class V>
inline void __stwb(V* to, V value) {
  ::simt::global_write(to, sizeof(V));
  *to = value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  return __uint_as_float(unsigned(::simt::shuffle_xor(mask, __float_as_uint(value), lane_mask)));
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
