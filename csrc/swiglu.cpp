// swiglu on the CPU: y = silu(gate) * up. The maths stands in swiglu.h.
//
// Element by element: 3W forward, 5W backward, the sigmoid computed again from the inputs in the backward. Rows may
// be halves of a wider tensor, so a row is the unit; long ones are staged and streamed in pieces that stay in the
// first-level cache.
#include "swiglu.h"

#include "cpu/rows.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

constexpr int64_t kPiece = 2048;  // columns at a time

// body(b, l, column, n) for every piece of every row.
template <class F>
TWOSTEP_INLINE void for_pieces(const Runs& runs, int64_t width, int64_t first, int64_t last, const F& body) {
  for (int64_t i = first; i < last; ++i) {
    const Run run = runs[i];
    for (int64_t l = run.begin; l < run.end; ++l) {
      for (int64_t c = 0; c < width; c += kPiece) body(run.batch, l, c, smaller(kPiece, width - c));
    }
  }
}

template <class T>
TWOSTEP_INLINE void forward_piece(const T* gate, const T* up, int64_t n, T* y) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch_ahead(gate + d);
    prefetch_ahead(up + d);
    const Vec<A> g = load(gate + d, lanes);
    store(y + d, g * sigmoid(g) * load(up + d, lanes), lanes);
  });
}

template <class T>
void forward(const SwigluForward& a) {
  const Runs runs = short_runs(a.batch, a.length, a.width);
  parallel(runs.count(), runs.rows * a.width, [=, &a](int64_t first, int64_t last) {
    const int64_t piece = smaller(kPiece, a.width);
    Scratch scratch(1, piece, sizeof(T));
    const Output<T> output(a.batch * a.length * a.width, piece, scratch);
    for_pieces(runs, a.width, first, last, [&](int64_t b, int64_t l, int64_t c, int64_t n) {
      T* y = static_cast<T*>(a.y) + (b * a.length + l) * a.width + c;
      forward_piece(row_of<T>(a.gate, b, l) + c, row_of<T>(a.up, b, l) + c, n, output.row(y));
      output.done(y, n);
    });
  });
}

template <class T>
TWOSTEP_INLINE void backward_piece(const T* dy, const T* gate, const T* up, int64_t n, T* dgate, T* dup) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch_ahead(dy + d);
    prefetch_ahead(gate + d);
    prefetch_ahead(up + d);
    const Vec<A> g = load(gate + d, lanes);
    const Vec<A> s = sigmoid(g);
    const Vec<A> dy_s = load(dy + d, lanes) * s;
    store(dgate + d, dy_s * load(up + d, lanes) * (1 + g * (1 - s)), lanes);
    store(dup + d, dy_s * g, lanes);
  });
}

template <class T>
void backward(const SwigluBackward& a) {
  const Runs runs = short_runs(a.batch, a.length, a.width);
  parallel(runs.count(), runs.rows * a.width, [=, &a](int64_t first, int64_t last) {
    const int64_t piece = smaller(kPiece, a.width);
    Scratch scratch(2, piece, sizeof(T));
    const Output<T> output(a.batch * a.length * a.width, piece, scratch, 2);
    for_pieces(runs, a.width, first, last, [&](int64_t b, int64_t l, int64_t c, int64_t n) {
      T* dgate = row_of<T>(a.dgate, b, l) + c;
      T* dup = row_of<T>(a.dup, b, l) + c;
      backward_piece(row_of<T>(a.dy, b, l) + c, row_of<T>(a.gate, b, l) + c, row_of<T>(a.up, b, l) + c, n,
                     output.row(dgate, 0), output.row(dup, 1));
      output.done(dgate, n, 0);
      output.done(dup, n, 1);
    });
  });
}

}  // namespace

void swiglu_forward(const SwigluForward& a) {
  with_type(a.dtype, [&](auto type) { forward<typename decltype(type)::type>(a); });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<typename decltype(type)::type>(a); });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
