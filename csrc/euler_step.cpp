// euler_step on the CPU: y = x + delta * v. The maths stands in euler_step.h.
//
// One pass over memory either way, in pieces; large outputs go past the caches.
#include "euler_step.h"

#include "cpu/samples.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

template <class A>
TWOSTEP_INLINE A delta_of(double delta, const void* deltas, int64_t b) {
  return deltas ? static_cast<const A*>(deltas)[b] : static_cast<A>(delta);
}

template <class X, class V>
TWOSTEP_INLINE void forward_piece(const X* x, const V* v, Acc<X> delta, int64_t n, To<X> y) {
  for_vectors<Acc<X>>(n, [&](int64_t d, auto lanes)
                             TWOSTEP_LAMBDA { store(y + d, load(x + d, lanes) + delta * load(v + d, lanes), lanes); });
}

template <class X, class V>
void forward(const EulerStepForward& a) {
  const Pieces pieces = Joining(a.batch, a.size, !a.deltas).samples(a.x).samples(a.v).pieces(kElementsAtOnce);
  parallel(pieces.count(), smaller(pieces.piece, pieces.size), [=, &a](int64_t first, int64_t last) {
    const Output<X> output(a.batch * a.size, pieces.piece);
    for_pieces(pieces, first, last, [&](int64_t b, int64_t i, int64_t n) {
      X* y = static_cast<X*>(a.y) + b * a.size + i;
      forward_piece(sample_of<X>(a.x, b) + i, sample_of<V>(a.v, b) + i, delta_of<Acc<X>>(a.delta, a.deltas, b), n,
                    output.row(y));
    });
  });
}

template <class X, class V>
TWOSTEP_INLINE void backward_piece(const X* dy, Acc<X> delta, int64_t n, To<V> dv) {
  for_vectors<Acc<X>>(n,
                      [&](int64_t d, auto lanes) TWOSTEP_LAMBDA { store(dv + d, delta * load(dy + d, lanes), lanes); });
}

template <class X, class V>
void backward(const EulerStepBackward& a) {
  const Pieces pieces = Joining(a.batch, a.size, !a.deltas).samples(a.dy).pieces(kElementsAtOnce);
  parallel(pieces.count(), smaller(pieces.piece, pieces.size), [=, &a](int64_t first, int64_t last) {
    const Output<V> output(a.batch * a.size, pieces.piece);
    for_pieces(pieces, first, last, [&](int64_t b, int64_t i, int64_t n) {
      V* dv = static_cast<V*>(a.dv) + b * a.size + i;
      backward_piece(sample_of<X>(a.dy, b) + i, delta_of<Acc<X>>(a.delta, a.deltas, b), n, output.row(dv));
    });
  });
}

}  // namespace

void euler_step_forward(const EulerStepForward& a) {
  with_two_types(a.dtype, a.velocity_dtype, [&](auto state, auto velocity) {
    forward<typename decltype(state)::type, typename decltype(velocity)::type>(a);
  });
}

void euler_step_backward(const EulerStepBackward& a) {
  with_two_types(a.dtype, a.velocity_dtype, [&](auto state, auto velocity) {
    backward<typename decltype(state)::type, typename decltype(velocity)::type>(a);
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
