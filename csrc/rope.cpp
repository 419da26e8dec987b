// rope on the CPU: rotary embedding alone. The maths stands in rope.h; cpu/rotary.h has the vector form.
//
// 2U and the table either way. A token's table row is spread once for all its heads, and a token's heads leave
// together, as one dense row.
#include "rope.h"

#include "cpu/rotary.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

template <class T>
TWOSTEP_INLINE void rotate_head(const T* x, const T* next_x, const Rotation<Acc<T>>& rotation, int64_t width, T* y) {
  for_vectors<Acc<T>>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch(next_x + d);
    store(y + d, rotation.rotate(load(x + d, lanes), d, lanes), lanes);
  });
}

template <class T>
void rotate_all(const Rope& a) {
  using A = Acc<T>;
  const int64_t width = a.width, token = a.x.heads * width;
  const Runs runs = short_runs(a.batch, a.length, token);
  parallel(runs.count(), runs.rows * token, [=, &a](int64_t first, int64_t last) {
    Scratch scratch(2 + a.x.heads, width, sizeof(A));
    Rotation<A> rotation(scratch, width);
    const Output<T> output(a.batch * a.length * token, token, scratch);
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      for (int64_t l = run.begin; l < run.end; ++l) {
        rotation.spread(row_of<A>(a.freqs, run.batch, l), width, a.inverse);
        T* destination = static_cast<T*>(a.y) + (run.batch * a.length + l) * token;
        T* y = output.row(destination);
        const int64_t next = smaller(l + 1, a.length - 1);
        for (int64_t h = 0; h < a.x.heads; ++h) {
          rotate_head(head_of<T>(a.x, run.batch, l, h), head_of<T>(a.x, run.batch, next, h), rotation, width,
                      y + h * width);
        }
        output.done(destination, token);
      }
    }
  });
}

}  // namespace

void rope(const Rope& a) {
  with_type(a.dtype, [&](auto type) { rotate_all<typename decltype(type)::type>(a); });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
