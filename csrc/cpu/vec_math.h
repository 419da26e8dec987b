// exp, sigmoid and tanh of a vector. float: within 2 ulp where the result is a normal number (sigmoid is 0 below -88.7,
// as in PyTorch), NaN and infinities as libm has them. double: libm, lane by lane, since double serves gradient checks
// and never a long run.
#pragma once

#include "vec.h"

namespace twostep::cpu::TWOSTEP_ISA {

// v * 2^n for the whole n in [-151, 131]; overflows to infinity and underflows gradually.
TWOSTEP_INLINE F32v scale_by_power(F32v v, F32v n, I32v n_int) {
#if TWOSTEP_AVX512
  (void)n_int;
  return bit_cast<F32v>(_mm512_scalef_ps(bit_cast<__m512>(v), bit_cast<__m512>(n)));
#else
  (void)n;
  const I32v half = n_int >> 1;
  return v * bit_cast<F32v>((half + 127) << 23) * bit_cast<F32v>((n_int - half + 127) << 23);
#endif
}

// x, but at least -105 and at most 90, and NaN where it is NaN: of (bound, x), min and max take the second then.
TWOSTEP_INLINE F32v exp_range(F32v x) {
#if TWOSTEP_AVX512
  const __m512 below = _mm512_min_ps(_mm512_set1_ps(90.0f), bit_cast<__m512>(x));
  return bit_cast<F32v>(_mm512_max_ps(_mm512_set1_ps(-105.0f), below));
#elif TWOSTEP_AVX2
  const __m256 below = _mm256_min_ps(_mm256_set1_ps(90.0f), bit_cast<__m256>(x));
  return bit_cast<F32v>(_mm256_max_ps(_mm256_set1_ps(-105.0f), below));
#else
  x = x > 90.0f ? fill(90.0f) : x;
  return x < -105.0f ? fill(-105.0f) : x;
#endif
}

// x = n log 2 + r with |r| <= log(2) / 2; log 2 in two parts, so that r carries no error of the product. The
// polynomial is the one of Cephes' expf.
TWOSTEP_INLINE F32v exp(F32v x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  x = exp_range(x);
  const F32v shifted = x * 1.44269504088896341f + kRound;
  const F32v n = shifted - kRound;
  const F32v r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F32v p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I32v n_int = bit_cast<I32v>(shifted) - bit_cast<int32_t>(kRound);
  return scale_by_power(p, n, n_int);
}

TWOSTEP_INLINE F64v exp(F64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class V>
TWOSTEP_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// Near zero an odd polynomial (Cephes' tanhf), since 1 - 2 / (exp(2x) + 1) cancels there.
TWOSTEP_INLINE F32v tanh(F32v x) {
  const F32v magnitude = bit_cast<F32v>(bit_cast<I32v>(x) & 0x7fffffff);
  const F32v z = x * x;
  F32v p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const F32v near = p * z * x + x;
  const F32v far = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
  const F32v signed_far = bit_cast<F32v>(bit_cast<I32v>(far) | (bit_cast<I32v>(x) & INT32_MIN));
  return magnitude < 0.625f ? near : signed_far;
}

TWOSTEP_INLINE F64v tanh(F64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace twostep::cpu::TWOSTEP_ISA
