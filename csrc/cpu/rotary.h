// Rotary embedding of interleaved pairs, by vectors. A token's table row (cos, sin, cos, sin, ...) is spread once into
// two rows that every head of the token then uses:
//   cosines = (c0, c0, c1, c1, ...)      sines = (-s0, s0, -s1, s1, ...)
//   y = x * cosines + swap_pairs(x) * sines
// The inverse rotation negates the sines.
#pragma once

#include "rows.h"

namespace twostep::cpu::TWOSTEP_ISA {

template <class A>
struct Rotation {
  A *cosines, *sines;

  Rotation(Scratch& scratch, int64_t width) : cosines(scratch.row<A>(width)), sines(scratch.row<A>(width)) {}

  TWOSTEP_INLINE void spread(const A* table, int64_t width, bool inverse) {
    // -1, 1, -1, 1, ... or the opposite
    const Vec<A> sign = __builtin_convertvector(((lane_numbers<A>() & 1) * 2 - 1) * (inverse ? -1 : 1), Vec<A>);
    for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
      const Vec<A> pairs = load(table + d, lanes);
      store(cosines + d, firsts_of_pairs<A>(pairs), lanes);
      store(sines + d, seconds_of_pairs<A>(pairs) * sign, lanes);
    });
  }

  template <class Lanes>
  TWOSTEP_INLINE Vec<A> rotate(Vec<A> x, int64_t d, Lanes lanes) const {
    return x * load(cosines + d, lanes) + swap_pairs<A>(x) * load(sines + d, lanes);
  }
};

template <class T>
TWOSTEP_INLINE const T* head_of(const ConstHeads& heads, int64_t b, int64_t l, int64_t h) {
  return static_cast<const T*>(heads.data) + b * heads.batch_stride + l * heads.token_stride + h * heads.head_stride;
}

}  // namespace twostep::cpu::TWOSTEP_ISA
