// Vectors of float or double, as wide as the instruction set has them, and how the four storage types reach them.
//
// Arithmetic is the compiler's own (vector_size), so one source serves AVX-512, AVX2, SSE2 and NEON. What is written
// by hand are the conversions: bfloat16 and float16 round to nearest even on store and keep NaN a NaN. A load or
// store takes Full, or Part{n} for the first n lanes at a row's end; Part neither reads nor writes past them, and
// loads zeros into the other lanes.
#pragma once

#include <cstdint>

#include "isa.h"

namespace twostep::cpu::TWOSTEP_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// What a storage type is computed in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

using F32v = float __attribute__((vector_size(TWOSTEP_VECTOR_BYTES)));
using F64v = double __attribute__((vector_size(TWOSTEP_VECTOR_BYTES)));
using I32v = int32_t __attribute__((vector_size(TWOSTEP_VECTOR_BYTES)));
using I64v = int64_t __attribute__((vector_size(TWOSTEP_VECTOR_BYTES)));
using U32v = uint32_t __attribute__((vector_size(TWOSTEP_VECTOR_BYTES)));
using U16h = uint16_t __attribute__((vector_size(TWOSTEP_VECTOR_BYTES / 2)));  // as many lanes as U32v

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  using type = F32v;
  using integer = I32v;
};
template <>
struct VecOf<double> {
  using type = F64v;
  using integer = I64v;
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using IntVec = typename VecOf<A>::integer;

template <class A>
constexpr int64_t kLanes = TWOSTEP_VECTOR_BYTES / int64_t{sizeof(A)};

struct Full {};
struct Part {
  int64_t n;  // 0 < n < lanes
};

template <class To, class From>
TWOSTEP_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class A>
TWOSTEP_INLINE Vec<A> fill(A value) {
  return Vec<A>{} + value;
}

template <class A>
TWOSTEP_INLINE IntVec<A> lane_numbers() {
  IntVec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i;
  return v;
}

// v where the lane holds an element of the row, 0 in the lanes beyond it.
template <class A>
TWOSTEP_INLINE Vec<A> keep(Vec<A> v, Full) {
  return v;
}
template <class A>
TWOSTEP_INLINE Vec<A> keep(Vec<A> v, Part part) {
  const IntVec<A> n = IntVec<A>{} + static_cast<decltype(lane_numbers<A>()[0] + 0)>(part.n);
  return lane_numbers<A>() < n ? v : Vec<A>{};
}

// --- float, double

TWOSTEP_INLINE F32v load(const float* p, Full) {
  F32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TWOSTEP_INLINE F64v load(const double* p, Full) {
  F64v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TWOSTEP_INLINE void store(float* p, F32v v, Full) { __builtin_memcpy(p, &v, sizeof v); }
TWOSTEP_INLINE void store(double* p, F64v v, Full) { __builtin_memcpy(p, &v, sizeof v); }

// --- 16-bit integers and 32-bit ones: by intrinsics where GCC 12's __builtin_convertvector takes three times the work

#if TWOSTEP_AVX512
TWOSTEP_INLINE U32v widen_u16(U16h h) { return bit_cast<U32v>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h))); }
TWOSTEP_INLINE U16h narrow_u32(U32v u) { return bit_cast<U16h>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(u))); }
#elif TWOSTEP_AVX2
TWOSTEP_INLINE U32v widen_u16(U16h h) { return bit_cast<U32v>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h))); }
TWOSTEP_INLINE U16h narrow_u32(U32v u) {
  const __m256i v = bit_cast<__m256i>(u);
  return bit_cast<U16h>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
#else
TWOSTEP_INLINE U32v widen_u16(U16h h) { return __builtin_convertvector(h, U32v); }
TWOSTEP_INLINE U16h narrow_u32(U32v u) { return __builtin_convertvector(u, U16h); }
#endif

// --- bfloat16: the upper half of a float

TWOSTEP_INLINE F32v widen_bf16(U16h h) { return bit_cast<F32v>(widen_u16(h) << 16); }

TWOSTEP_INLINE U16h narrow_bf16(F32v v) {
  const U32v u = bit_cast<U32v>(v);
  // Adding 0x7fff, and 1 more where the kept part is odd, carries exactly where rounding to nearest even goes up.
  const U32v rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32v quiet = (u >> 16) | 0x40u;
  return narrow_u32(v == v ? rounded : quiet);
}

TWOSTEP_INLINE F32v load(const Bf16* p, Full) {
  U16h h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_bf16(h);
}
TWOSTEP_INLINE void store(Bf16* p, F32v v, Full) {
  const U16h h = narrow_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// --- float16: F16C where there is AVX2, else integer arithmetic

#if TWOSTEP_AVX512
TWOSTEP_INLINE F32v widen_f16(U16h h) { return bit_cast<F32v>(_mm512_cvtph_ps(bit_cast<__m256i>(h))); }
TWOSTEP_INLINE U16h narrow_f16(F32v v) {
  return bit_cast<U16h>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif TWOSTEP_AVX2
TWOSTEP_INLINE F32v widen_f16(U16h h) { return bit_cast<F32v>(_mm256_cvtph_ps(bit_cast<__m128i>(h))); }
TWOSTEP_INLINE U16h narrow_f16(F32v v) {
  return bit_cast<U16h>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
TWOSTEP_INLINE F32v widen_f16(U16h h) {
  const U32v u = widen_u16(h);
  const U32v magnitude = u & 0x7fffu;
  // The exponents' biases differ by 112; the product also puts subnormal halves right.
  const U32v finite = bit_cast<U32v>(bit_cast<F32v>(magnitude << 13) * 0x1p112f);
  const U32v special = (magnitude << 13) | 0x7f800000u;
  return bit_cast<F32v>((magnitude >= 0x7c00u ? special : finite) | ((u & 0x8000u) << 16));
}
TWOSTEP_INLINE U16h narrow_f16(F32v v) {
  const U32v all = bit_cast<U32v>(v);
  const U32v u = all & 0x7fffffffu;
  const U32v special = u > 0x7f800000u ? ((u >> 13) & 0x3ffu) | 0x7e00u : U32v{} + 0x7c00u;
  // A float's ulp at 0.5 is the half's smallest subnormal, so the addition itself rounds.
  const U32v subnormal = bit_cast<U32v>(bit_cast<F32v>(u) + 0.5f) - 0x3f000000u;
  const U32v normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const U32v half = u >= 0x47800000u ? special : (u < 0x38800000u ? subnormal : normal);
  return narrow_u32(half | ((all >> 16) & 0x8000u));
}
#endif

TWOSTEP_INLINE F32v load(const F16* p, Full) {
  U16h h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_f16(h);
}
TWOSTEP_INLINE void store(F16* p, F32v v, Full) {
  const U16h h = narrow_f16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// --- the end of a row, through a buffer on the stack: once a row, and never where the width is a multiple of the lanes

template <class T>
TWOSTEP_INLINE Vec<Acc<T>> load(const T* p, Part part) {
  T buffer[kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < part.n; ++i) buffer[i] = p[i];
  return load(buffer, Full{});
}
template <class T>
TWOSTEP_INLINE void store(T* p, Vec<Acc<T>> v, Part part) {
  T buffer[kLanes<Acc<T>>];
  store(buffer, v, Full{});
  for (int64_t i = 0; i < part.n; ++i) p[i] = buffer[i];
}

// --- across lanes

template <class V>
TWOSTEP_INLINE auto sum_lanes(V v) {
  auto total = v[0];
  for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof total); ++i) total += v[i];
  return total;
}
#if TWOSTEP_AVX512
TWOSTEP_INLINE float sum_lanes(F32v v) { return _mm512_reduce_add_ps(bit_cast<__m512>(v)); }
TWOSTEP_INLINE double sum_lanes(F64v v) { return _mm512_reduce_add_pd(bit_cast<__m512d>(v)); }
#elif TWOSTEP_AVX2
TWOSTEP_INLINE float sum_lanes(F32v v) {
  const __m256 whole = bit_cast<__m256>(v);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

// Pairs of lanes, for rotary embeddings: (a, b) -> (b, a), (a, a), (b, b). A pair never straddles two vectors.
#if defined(__clang__)
template <class A, int... kIndex>
struct PairShuffles {
  static TWOSTEP_INLINE Vec<A> swapped(Vec<A> v) { return __builtin_shufflevector(v, v, (kIndex ^ 1)...); }
  static TWOSTEP_INLINE Vec<A> firsts(Vec<A> v) { return __builtin_shufflevector(v, v, (kIndex & ~1)...); }
  static TWOSTEP_INLINE Vec<A> seconds(Vec<A> v) { return __builtin_shufflevector(v, v, (kIndex | 1)...); }
};
template <class A, int kCount, int... kIndex>
struct PairShufflesOf : PairShufflesOf<A, kCount - 1, kCount - 1, kIndex...> {};
template <class A, int... kIndex>
struct PairShufflesOf<A, 0, kIndex...> : PairShuffles<A, kIndex...> {};
template <class A>
TWOSTEP_INLINE Vec<A> swap_pairs(Vec<A> v) {
  return PairShufflesOf<A, kLanes<A>>::swapped(v);
}
template <class A>
TWOSTEP_INLINE Vec<A> firsts_of_pairs(Vec<A> v) {
  return PairShufflesOf<A, kLanes<A>>::firsts(v);
}
template <class A>
TWOSTEP_INLINE Vec<A> seconds_of_pairs(Vec<A> v) {
  return PairShufflesOf<A, kLanes<A>>::seconds(v);
}
#else
template <class A>
TWOSTEP_INLINE Vec<A> swap_pairs(Vec<A> v) {
  return __builtin_shuffle(v, lane_numbers<A>() ^ 1);
}
template <class A>
TWOSTEP_INLINE Vec<A> firsts_of_pairs(Vec<A> v) {
  return __builtin_shuffle(v, lane_numbers<A>() & ~1);
}
template <class A>
TWOSTEP_INLINE Vec<A> seconds_of_pairs(Vec<A> v) {
  return __builtin_shuffle(v, lane_numbers<A>() | 1);
}
#endif

}  // namespace twostep::cpu::TWOSTEP_ISA
