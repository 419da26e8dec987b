// dmd_direction on the CPU: (fake - real) / max(mean |x - real|, eps). The maths stands in dmd_direction.h.
//
// Few samples are finished before the next are begun, so that `real` is still in cache when it is read again. Small
// samples are dealt to threads whole; large ones are worked on by all threads, piece by piece, twice. Either way a
// piece is summed alone and the pieces' sums are added in order, so the bits do not depend on which way it went.
#include "dmd_direction.h"

#include "cpu/samples.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

// Pieces of a sample from which on all threads share it: 65536 elements take some 50 microseconds, and waking the
// threads twice takes 5 to 10.
constexpr int64_t kSharedFrom = 16;
// Elements of samples that are worked on together: 8 MB of float x and real, within a last-level cache, and four
// latents of 1024 x 1024 pixels. Their two passes take .7 ms on two cores; one by one they met eight times instead of
// two, and on cores with other work a meeting lasts a time slice: 53 ms were seen.
constexpr int64_t kElementsTogether = int64_t{1} << 20;

TWOSTEP_INLINE F32v magnitude(F32v v) { return bit_cast<F32v>(bit_cast<I32v>(v) & 0x7fffffff); }
TWOSTEP_INLINE F64v magnitude(F64v v) { return bit_cast<F64v>(bit_cast<I64v>(v) & INT64_MAX); }

template <class X, class P>
TWOSTEP_INLINE Acc<X> piece_sum(const X* x, const P* real, int64_t n) {
  using A = Acc<X>;
  Sums<A> sums;
  sum_vectors<A>(
      n,
      [&](int64_t d, auto lanes, auto slot)
          TWOSTEP_LAMBDA { sums.slots[slot] += magnitude(load(x + d, lanes) - load(real + d, lanes)); },
      sums);
  return sums.total();
}

template <class P>
TWOSTEP_INLINE void direction_piece(const P* real, const P* fake, Acc<P> scale, int64_t n, To<Acc<P>> direction) {
  for_vectors<Acc<P>>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    store(direction + d, (load(fake + d, lanes) - load(real + d, lanes)) * scale, lanes);
  });
}

template <class X, class P>
class Direction {
 public:
  using A = Acc<X>;

  explicit Direction(const DmdDirection& a) : a_(a), pieces_(a.batch, a.size, sample_piece) {}

  void run() const {
    const int64_t each = pieces_.per_sample;
    if (each < kSharedFrom) {
      parallel(a_.batch, a_.size, [this, each](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
          sums(b * each, (b + 1) * each);
          finish(b);
          directions(b * each, (b + 1) * each);
        }
      });
      return;
    }
    const int64_t together = larger(1, kElementsTogether / a_.size);
    for (int64_t b = 0; b < a_.batch; b += together) {
      const int64_t begin = b * each, count = smaller(together, a_.batch - b) * each;
      parallel(count, pieces_.piece, [=](int64_t first, int64_t last) { sums(begin + first, begin + last); });
      for (int64_t i = b; i < b + count / each; ++i) finish(i);
      parallel(count, pieces_.piece, [=](int64_t first, int64_t last) { directions(begin + first, begin + last); });
    }
  }

 private:
  void sums(int64_t first, int64_t last) const {
    for_pieces(pieces_, first, last, [&](int64_t b, int64_t i, int64_t n) {
      static_cast<A*>(a_.partials)[b * pieces_.per_sample + i / pieces_.piece] =
          piece_sum(sample_of<X>(a_.x, b) + i, sample_of<P>(a_.real, b) + i, n);
    });
  }

  // NaN stays NaN: it is not below eps. Infinity becomes NaN, by 0 * mean: 1 / infinity would hide it.
  void finish(int64_t b) const {
    const A* partials = static_cast<const A*>(a_.partials) + b * pieces_.per_sample;
    const double mean = sum_partials(partials, pieces_.per_sample) / static_cast<double>(a_.size);
    static_cast<A*>(a_.scales)[b] = static_cast<A>(1 / (mean < a_.eps ? a_.eps : mean) + 0 * mean);
  }

  void directions(int64_t first, int64_t last) const {
    const Output<A> output(a_.batch * a_.size, pieces_.piece);
    for_pieces(pieces_, first, last, [&](int64_t b, int64_t i, int64_t n) {
      A* to = static_cast<A*>(a_.direction) + b * a_.size + i;
      direction_piece(sample_of<P>(a_.real, b) + i, sample_of<P>(a_.fake, b) + i, static_cast<const A*>(a_.scales)[b],
                      n, output.row(to));
    });
  }

  const DmdDirection& a_;
  const Pieces pieces_;
};

}  // namespace

void dmd_direction(const DmdDirection& a) {
  if (a.size == 0) return;
  with_two_types(a.dtype, a.prediction_dtype, [&](auto state, auto prediction) {
    Direction<typename decltype(state)::type, typename decltype(prediction)::type>(a).run();
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
