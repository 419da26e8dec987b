// Vectors of float or double, as wide as the instruction set has them, and how the four storage types reach them.
//
// Arithmetic is the compiler's own (vector_size), so one source serves AVX-512, AVX2, SSE2 and NEON. What is written
// by hand are the conversions: bfloat16 and float16 round to nearest even on store and keep NaN a NaN. A load or
// store takes Full, or Part{n} for the first n lanes at a row's end; Part neither reads nor writes past them, and
// loads zeros into the other lanes. It is masked where the processor can: through a buffer, a row of 341 floats took
// half as long again.
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

#if TWOSTEP_AVX512
TWOSTEP_INLINE uint32_t first_bits(Part part) { return (uint32_t{1} << part.n) - 1; }
TWOSTEP_INLINE F32v load(const float* p, Part part) {
  return bit_cast<F32v>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(part)), p));
}
TWOSTEP_INLINE F64v load(const double* p, Part part) {
  return bit_cast<F64v>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_bits(part)), p));
}
TWOSTEP_INLINE void store(float* p, F32v v, Part part) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_bits(part)), bit_cast<__m512>(v));
}
TWOSTEP_INLINE void store(double* p, F64v v, Part part) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_bits(part)), bit_cast<__m512d>(v));
}
#elif TWOSTEP_AVX2
// All bits of the first n lanes; a masked load or store looks at the highest.
template <class A>
TWOSTEP_INLINE __m256i first_lanes(int64_t n) {
  return bit_cast<__m256i>(lane_numbers<A>() < static_cast<decltype(lane_numbers<A>()[0] + 0)>(n));
}
TWOSTEP_INLINE F32v load(const float* p, Part part) {
  return bit_cast<F32v>(_mm256_maskload_ps(p, first_lanes<float>(part.n)));
}
TWOSTEP_INLINE F64v load(const double* p, Part part) {
  return bit_cast<F64v>(_mm256_maskload_pd(p, first_lanes<double>(part.n)));
}
TWOSTEP_INLINE void store(float* p, F32v v, Part part) {
  _mm256_maskstore_ps(p, first_lanes<float>(part.n), bit_cast<__m256>(v));
}
TWOSTEP_INLINE void store(double* p, F64v v, Part part) {
  _mm256_maskstore_pd(p, first_lanes<double>(part.n), bit_cast<__m256d>(v));
}
#else
template <class V, class T>
TWOSTEP_INLINE V load_by_element(const T* p, Part part) {
  V v{};
  for (int64_t i = 0; i < part.n; ++i) v[i] = p[i];
  return v;
}
template <class V, class T>
TWOSTEP_INLINE void store_by_element(T* p, V v, Part part) {
  for (int64_t i = 0; i < part.n; ++i) p[i] = v[i];
}
TWOSTEP_INLINE F32v load(const float* p, Part part) { return load_by_element<F32v>(p, part); }
TWOSTEP_INLINE F64v load(const double* p, Part part) { return load_by_element<F64v>(p, part); }
TWOSTEP_INLINE void store(float* p, F32v v, Part part) { store_by_element(p, v, part); }
TWOSTEP_INLINE void store(double* p, F64v v, Part part) { store_by_element(p, v, part); }
#endif

// --- the bits of 16-bit types

TWOSTEP_INLINE U16h load_u16(const uint16_t* p, Full) {
  U16h h;
  __builtin_memcpy(&h, p, sizeof h);
  return h;
}
TWOSTEP_INLINE void store_u16(uint16_t* p, U16h h, Full) { __builtin_memcpy(p, &h, sizeof h); }

#if TWOSTEP_AVX512
TWOSTEP_INLINE U16h load_u16(const uint16_t* p, Part part) {
  return bit_cast<U16h>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_bits(part)), p));
}
TWOSTEP_INLINE void store_u16(uint16_t* p, U16h h, Part part) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first_bits(part)), bit_cast<__m256i>(h));
}
#elif TWOSTEP_AVX2
// Masks are for 32 bits here: pairs go by them, and the last element by itself, which where n is even is done twice.
TWOSTEP_INLINE __m128i first_pairs(Part part) { return _mm256_castsi256_si128(first_lanes<float>(part.n / 2)); }
TWOSTEP_INLINE U16h load_u16(const uint16_t* p, Part part) {
  const U16h pairs = bit_cast<U16h>(_mm_maskload_epi32(reinterpret_cast<const int*>(p), first_pairs(part)));
  const U16h lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const uint16_t last = static_cast<uint16_t>(part.n - 1);
  return lane == last ? U16h{} + p[last] : pairs;
}
TWOSTEP_INLINE void store_u16(uint16_t* p, U16h h, Part part) {
  _mm_maskstore_epi32(reinterpret_cast<int*>(p), first_pairs(part), bit_cast<__m128i>(h));
  p[part.n - 1] = h[part.n - 1];
}
#else
TWOSTEP_INLINE U16h load_u16(const uint16_t* p, Part part) { return load_by_element<U16h>(p, part); }
TWOSTEP_INLINE void store_u16(uint16_t* p, U16h h, Part part) { store_by_element(p, h, part); }
#endif

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

template <class Lanes>
TWOSTEP_INLINE F32v load(const Bf16* p, Lanes lanes) {
  return widen_bf16(load_u16(&p->bits, lanes));
}
template <class Lanes>
TWOSTEP_INLINE void store(Bf16* p, F32v v, Lanes lanes) {
  store_u16(&p->bits, narrow_bf16(v), lanes);
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

template <class Lanes>
TWOSTEP_INLINE F32v load(const F16* p, Lanes lanes) {
  return widen_f16(load_u16(&p->bits, lanes));
}
template <class Lanes>
TWOSTEP_INLINE void store(F16* p, F32v v, Lanes lanes) {
  store_u16(&p->bits, narrow_f16(v), lanes);
}

// --- what is stored of a vector, and what a load then finds

TWOSTEP_INLINE F32v narrow(float, F32v v) { return v; }
TWOSTEP_INLINE F64v narrow(double, F64v v) { return v; }
TWOSTEP_INLINE U16h narrow(Bf16, F32v v) { return narrow_bf16(v); }
TWOSTEP_INLINE U16h narrow(F16, F32v v) { return narrow_f16(v); }
TWOSTEP_INLINE F32v widen(float, F32v v) { return v; }
TWOSTEP_INLINE F64v widen(double, F64v v) { return v; }
TWOSTEP_INLINE F32v widen(Bf16, U16h h) { return widen_bf16(h); }
TWOSTEP_INLINE F32v widen(F16, U16h h) { return widen_f16(h); }

template <class T>
TWOSTEP_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  return widen(T{}, narrow(T{}, v));
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
