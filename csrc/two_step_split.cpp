// two_step_split on the CPU: z = noise + (mid - 1) * v and x_a = noise - v. The maths stands in two_step_split.h.
//
// One pass over memory either way, in pieces; large outputs go past the caches.
#include "two_step_split.h"

#include "cpu/samples.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

template <class X, class V>
TWOSTEP_INLINE void forward_piece(const X* noise, const V* v, Acc<X> step, int64_t n, To<X> z, To<X> x_a) {
  for_vectors<Acc<X>>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    const auto from = load(noise + d, lanes), velocity = load(v + d, lanes);
    store(z + d, from + step * velocity, lanes);
    store(x_a + d, from - velocity, lanes);
  });
}

template <class X, class V>
void forward(const TwoStepSplitForward& a) {
  const Pieces pieces = Joining(a.batch, a.size, true).samples(a.noise).samples(a.v).pieces(kElementsAtOnce);
  parallel(pieces.count(), smaller(pieces.piece, pieces.size), [=, &a](int64_t first, int64_t last) {
    const Output<X> output(a.batch * a.size, pieces.piece);
    for_pieces(pieces, first, last, [&](int64_t b, int64_t i, int64_t n) {
      X* z = static_cast<X*>(a.z) + b * a.size + i;
      X* x_a = static_cast<X*>(a.x_a) + b * a.size + i;
      forward_piece(sample_of<X>(a.noise, b) + i, sample_of<V>(a.v, b) + i, static_cast<Acc<X>>(a.step), n,
                    output.row(z), output.row(x_a));
    });
  });
}

template <bool kInherited, bool kOwn, class X, class V>
TWOSTEP_INLINE void backward_piece(const X* inherited, const X* own, Acc<X> coefficient, int64_t n, To<V> dv) {
  for_vectors<Acc<X>>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    Vec<Acc<X>> g{};
    if (kInherited) {
      g = coefficient * load(inherited + d, lanes);
    }
    if (kOwn) {
      g -= load(own + d, lanes);
    }
    store(dv + d, g, lanes);
  });
}

template <bool kInherited, bool kOwn, class X, class V>
void backward(const TwoStepSplitBackward& a) {
  const bool alike = !a.factors || a.factor_stride == 0;
  const Pieces pieces = Joining(a.batch, a.size, alike).samples(a.inherited).samples(a.own).pieces(kElementsAtOnce);
  parallel(pieces.count(), smaller(pieces.piece, pieces.size), [=, &a](int64_t first, int64_t last) {
    using A = Acc<X>;
    const Output<V> output(a.batch * a.size, pieces.piece);
    for_pieces(pieces, first, last, [&](int64_t b, int64_t i, int64_t n) {
      V* dv = static_cast<V*>(a.dv) + b * a.size + i;
      const A factor = a.factors ? static_cast<const A*>(a.factors)[b * a.factor_stride] : A{1};
      const X* inherited = kInherited ? sample_of<X>(a.inherited, b) + i : nullptr;
      const X* own = kOwn ? sample_of<X>(a.own, b) + i : nullptr;
      backward_piece<kInherited, kOwn>(inherited, own, static_cast<A>(a.coefficient) * factor, n, output.row(dv));
    });
  });
}

}  // namespace

void two_step_split_forward(const TwoStepSplitForward& a) {
  with_two_types(a.dtype, a.velocity_dtype, [&](auto state, auto velocity) {
    forward<typename decltype(state)::type, typename decltype(velocity)::type>(a);
  });
}

void two_step_split_backward(const TwoStepSplitBackward& a) {
  with_two_types(a.dtype, a.velocity_dtype, [&](auto state, auto velocity) {
    using X = typename decltype(state)::type;
    using V = typename decltype(velocity)::type;
    if (a.inherited.data && a.own.data) return backward<true, true, X, V>(a);
    a.own.data ? backward<false, true, X, V>(a) : backward<true, false, X, V>(a);
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
