// gradient_norms on the CPU. The maths stands in gradient_norms.h.
//
// One pass over memory, a piece at a time, in parallel; the pieces' sums are then added in order by one thread.
#include "gradient_norms.h"

#include "cpu/samples.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

template <class T>
TWOSTEP_INLINE Acc<T> piece_sum(const T* g, int64_t n) {
  using A = Acc<T>;
  Sums<A> sums;
  sum_vectors<A>(
      n,
      [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
        const Vec<A> v = load(g + d, lanes);
        sums.slots[slot] += v * v;
      },
      sums);
  return sums.total();
}

template <class T>
void norms_of(const GradientNorms& a) {
  using A = Acc<T>;
  const Pieces pieces(a.batch, a.size, sample_piece);
  A* partials = static_cast<A*>(a.partials);
  parallel(pieces.count(), smaller(pieces.piece, pieces.size), [=, &a](int64_t first, int64_t last) {
    for_pieces(pieces, first, last, [&](int64_t b, int64_t i, int64_t n) {
      partials[b * pieces.per_sample + i / pieces.piece] = piece_sum(sample_of<T>(a.g, b) + i, n);
    });
  });
  double total = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const double sum = sum_partials(partials + b * pieces.per_sample, pieces.per_sample);
    static_cast<A*>(a.norms)[b] = static_cast<A>(square_root(sum));
    total += sum;
  }
  *static_cast<A*>(a.total) = static_cast<A>(square_root(total));
}

}  // namespace

void gradient_norms(const GradientNorms& a) {
  with_type(a.dtype, [&](auto type) { norms_of<typename decltype(type)::type>(a); });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
