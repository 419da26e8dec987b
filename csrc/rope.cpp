// rope on the CPU: rotary embedding alone. The maths stands in rope.h; cpu/rotary.h has the vector form.
//
// 2U and the table either way. A token's table row is spread once for all its heads.
#include "rope.h"

#include "cpu/rotary.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

template <class T>
TWOSTEP_INLINE void rotate_head(const T* x, const Rotation<Acc<T>>& rotation, int64_t width, To<T> y) {
  for_vectors<Acc<T>>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    store(y + d, rotation.rotate(load(x + d, lanes), d, lanes), lanes);
  });
}

template <class T>
void rotate_all(const Rope& a) {
  using A = Acc<T>;
  const int64_t width = a.width, token = a.x.heads * width;
  const Runs runs = short_runs(a.batch, a.length, token);
  parallel(runs.count(), runs.rows * token, [=, &a](int64_t first, int64_t last) {
    Scratch scratch(2, width, sizeof(A));
    Rotation<A> rotation(scratch, width);
    const Output<T> output(a.batch * a.length * token, width);
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      for (int64_t l = run.begin; l < run.end; ++l) {
        rotation.spread(row_of<A>(a.freqs, run.batch, l), width, a.inverse);
        const To<T> y = output.row(static_cast<T*>(a.y) + (run.batch * a.length + l) * token);
        for (int64_t h = 0; h < a.x.heads; ++h) {
          rotate_head(head_of<T>(a.x, run.batch, l, h), rotation, width, y + h * width);
        }
      }
    }
  });
}

}  // namespace

void rope(const Rope& a) {
  with_type(a.dtype, [&](auto type) { rotate_all<typename decltype(type)::type>(a); });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
