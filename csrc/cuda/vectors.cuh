// Elements in memory and in registers: 16-byte accesses where the caller's vector is that wide, single elements
// elsewhere, fp32 in registers, round to nearest even on the way out.
//
// All device memory goes through __ldg, __ldcg and __stwb and all shared memory through shared_load and
// shared_store, so that the host emulation (csrc/simt) sees, checks and orders every access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../views.h"

namespace twostep::cuda {

// Elements of a 16-byte vector.
template <class T>
constexpr int wide_vector = 16 / int(sizeof(T));

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// One 32-bit word holds one float or two 16-bit elements, the lower address in the lower half.
template <class T>
__device__ inline void decode_word(unsigned word, float* out) {
  if constexpr (sizeof(T) == 4) {
    out[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __half>) {
    out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
    out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  } else {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
}

template <class T>
__device__ inline unsigned encode_word(const float* in) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(in[0]);
  } else if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(in[0], in[1]);
    return unsigned(__half_as_ushort(__low2half(pair))) | unsigned(__half_as_ushort(__high2half(pair))) << 16;
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
    return unsigned(__bfloat16_as_ushort(__low2bfloat16(pair))) | unsigned(__bfloat16_as_ushort(__high2bfloat16(pair)))
                                                                      << 16;
  }
}

template <class T>
__device__ inline void decode(uint4 raw, float* out) {
  constexpr int n = 4 / int(sizeof(T));
  decode_word<T>(raw.x, out);
  decode_word<T>(raw.y, out + n);
  decode_word<T>(raw.z, out + 2 * n);
  decode_word<T>(raw.w, out + 3 * n);
}

template <class T>
__device__ inline uint4 encode(const float* in) {
  constexpr int n = 4 / int(sizeof(T));
  return make_uint4(encode_word<T>(in), encode_word<T>(in + n), encode_word<T>(in + 2 * n), encode_word<T>(in + 3 * n));
}

// W elements from device memory that no thread writes during the launch. Vectors of a multiple of 16 bytes are
// aligned (the launcher has checked); shorter ones need no more than the element's own alignment.
template <int W, class T>
__device__ inline void load(const T* from, float (&out)[W]) {
  if constexpr (W * sizeof(T) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < W / wide_vector<T>; ++i) {
      decode<T>(__ldg(reinterpret_cast<const uint4*>(from) + i), out + i * wide_vector<T>);
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) out[i] = to_float(__ldg(from + i));
  }
}

template <int W, class T>
__device__ inline void store(T* to, const float (&in)[W]) {
  if constexpr (W * sizeof(T) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < W / wide_vector<T>; ++i) {
      __stwb(reinterpret_cast<uint4*>(to) + i, encode<T>(in + i * wide_vector<T>));
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) __stwb(to + i, from_float<T>(in[i]));
  }
}

// Adds to floats that this very thread wrote before: through the coherent path, never the read-only cache.
template <int W>
__device__ inline void add_in_place(float* sums, const float (&in)[W]) {
  if constexpr (W % 4 == 0) {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      uint4* at = reinterpret_cast<uint4*>(sums + i);
      float held[4];
      decode<float>(__ldcg(at), held);
#pragma unroll
      for (int j = 0; j < 4; ++j) held[j] += in[i + j];
      __stwb(at, encode<float>(held));
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) __stwb(sums + i, __ldcg(sums + i) + in[i]);
  }
}

// Parameters have the activations' dtype or are f32; the branch is uniform over the launch.
template <int W, class T>
__device__ inline void load_parameter(const void* data, bool f32, int64_t offset, float (&out)[W]) {
  if (sizeof(T) == 4 || f32) {
    load<W>(static_cast<const float*>(data) + offset, out);
  } else {
    load<W>(static_cast<const T*>(data) + offset, out);
  }
}

template <int W, class T>
__device__ inline void store_parameter(void* data, bool f32, int64_t offset, const float (&in)[W]) {
  if (sizeof(T) == 4 || f32) {
    store<W>(static_cast<float*>(data) + offset, in);
  } else {
    store<W>(static_cast<T*>(data) + offset, in);
  }
}

}  // namespace twostep::cuda
