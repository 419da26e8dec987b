// Stands in for CUDA's header when kernels are compiled for the host.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const unsigned sign = unsigned(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = std::ldexp(float(fraction), -24);
  return sign != 0 ? -small : small;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = uint16_t(__float_as_uint(x) >> 16 & 0x8000u);
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.f) return {uint16_t(sign | 0x7c00u)};
  // The spacing of halves around x; nearbyint rounds ties to even.
  const int exponent = size < 6.103515625e-5f ? -14 : std::ilogb(size);
  const float units = std::nearbyint(std::ldexp(size, 10 - exponent));
  const float rounded = std::ldexp(units, exponent - 10);
  if (rounded < 6.103515625e-5f) return {uint16_t(sign | unsigned(std::ldexp(rounded, 24)))};
  const unsigned bits = __float_as_uint(rounded);
  return {uint16_t(sign | ((bits >> 23) - 112) << 10 | (bits >> 13 & 1023u))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half __low2half(__half2 pair) { return pair.x; }
inline __half __high2half(__half2 pair) { return pair.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
