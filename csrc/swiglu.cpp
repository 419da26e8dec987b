// swiglu on the CPU: y = silu(gate) * up. The maths stands in swiglu.h.
//
// Element by element: 3W forward, 5W backward, the sigmoid computed again from the inputs in the backward. Rows may
// be halves of a wider tensor, so a row is the unit.
#include "swiglu.h"

#include "cpu/rows.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

// body(b, l) for every row.
template <class F>
TWOSTEP_INLINE void for_rows(const Runs& runs, int64_t first, int64_t last, const F& body) {
  for (int64_t i = first; i < last; ++i) {
    const Run run = runs[i];
    for (int64_t l = run.begin; l < run.end; ++l) body(run.batch, l);
  }
}

template <class T>
TWOSTEP_INLINE void forward_row(const T* gate, const T* up, int64_t n, To<T> y) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    const Vec<A> g = load(gate + d, lanes);
    store(y + d, g * sigmoid(g) * load(up + d, lanes), lanes);
  });
}

template <class T>
void forward(const SwigluForward& a) {
  const Runs runs = short_runs(a.batch, a.length, a.width);
  parallel(runs.count(), runs.rows * a.width, [=, &a](int64_t first, int64_t last) {
    const Output<T> output(a.batch * a.length * a.width, a.width);
    for_rows(runs, first, last, [&](int64_t b, int64_t l) {
      const To<T> y = output.row(static_cast<T*>(a.y) + (b * a.length + l) * a.width);
      forward_row(row_of<T>(a.gate, b, l), row_of<T>(a.up, b, l), a.width, y);
    });
  });
}

template <class T>
TWOSTEP_INLINE void backward_row(const T* dy, const T* gate, const T* up, int64_t n, To<T> dgate, To<T> dup) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
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
    const Output<T> output(a.batch * a.length * a.width, a.width);
    for_rows(runs, first, last, [&](int64_t b, int64_t l) {
      backward_row(row_of<T>(a.dy, b, l), row_of<T>(a.gate, b, l), row_of<T>(a.up, b, l), a.width,
                   output.row(row_of<T>(a.dgate, b, l)), output.row(row_of<T>(a.dup, b, l)));
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
