// Walking samples, [batch, size], in pieces that stay in the first-level cache, and sums over them.
#pragma once

#include "rows.h"

namespace twostep::cpu::TWOSTEP_ISA {

template <class T>
TWOSTEP_INLINE const T* sample_of(const ConstSamples& samples, int64_t b) {
  return static_cast<const T*>(samples.data) + b * samples.stride;
}

// f(type of the state, type of what the network gave): one type, or float beside 16 bits.
template <class F>
void with_two_types(Dtype state, Dtype network, const F& f) {
  with_type(state, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (network == Dtype::bf16) return f(type, Type<Bf16>{});
      if (network == Dtype::f16) return f(type, Type<F16>{});
    }
    f(type, type);
  });
}

// A [batch, size] problem cut into pieces; item i is piece i % per_sample of sample i / per_sample.
struct Pieces {
  int64_t batch, size, piece, per_sample;

  Pieces(int64_t batch_, int64_t size_, int64_t piece_)
      : batch(batch_), size(size_), piece(piece_), per_sample(divide_up(size_, piece_)) {}
  int64_t count() const { return batch * per_sample; }
};

constexpr int64_t kElementsAtOnce = 2048;  // of each tensor: with three of float 24 KB, which a first-level cache holds

// Samples that follow each other without a gap in every tensor are one long sample, if nothing else tells them apart.
class Joining {
 public:
  Joining(int64_t batch, int64_t size, bool alike) : batch_(batch), size_(size), joins_(alike) {}
  Joining& samples(const ConstSamples& x) {
    joins_ = joins_ && (x.data == nullptr || batch_ == 1 || x.stride == size_);
    return *this;
  }
  Pieces pieces(int64_t piece) const {
    return joins_ ? Pieces(batch_ > 0 ? 1 : 0, batch_ * size_, piece) : Pieces(batch_, size_, piece);
  }

 private:
  int64_t batch_, size_;
  bool joins_;
};

// body(sample, first element, elements) for the pieces first .. last - 1.
template <class F>
TWOSTEP_INLINE void for_pieces(const Pieces& of, int64_t first, int64_t last, const F& body) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t b = i / of.per_sample, begin = (i - b * of.per_sample) * of.piece;
    body(b, begin, smaller(of.piece, of.size - begin));
  }
}

// The sums of a sample's pieces, added in order.
template <class A>
TWOSTEP_INLINE double sum_partials(const A* partials, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<double>(partials[i]);
  return total;
}

}  // namespace twostep::cpu::TWOSTEP_ISA
