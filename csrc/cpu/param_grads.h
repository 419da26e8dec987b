// The second stage of a backward: sums of the runs' partial sums, in a fixed order, become gradients of parameters.
//
// With P[b] = sum_s partials[b, s], v the modulation (1 + scale, act(gate)) and v' its derivative:
//   dsample[b] = v'[b] * weight * P[b]          dweight = sum_b v[b] * P[b]
// A per-token modulation has been multiplied in already, and its own gradient written: then dweight = sum_b P[b].
// One pass over partials, in blocks of columns that stay on the stack and can go to different threads.
#pragma once

#include "rows.h"

namespace twostep::cpu::TWOSTEP_ISA {

struct ParamGrads {
  const void* partials;  // [batch, splits, width]
  int64_t batch, splits, width;
  Dtype param_dtype;
  Modulation kind;
  const void* weight;    // [width] or null
  ConstRows modulation;  // per sample; no data where absent or per token
  void* dsample;         // [batch, width], or null where not wanted
  void* dweight;         // [width], or null where not wanted
};

constexpr int64_t kColumnBlock = 256;

template <class A>
void reduce_columns(const ParamGrads& g, int64_t column, int64_t n) {
  A weight[kColumnBlock], value[kColumnBlock], derivative[kColumnBlock], total[kColumnBlock];
  A dweight[kColumnBlock], lost[kColumnBlock];  // the sum over samples, and what its last rounding lost (Kahan)
  fill_row(dweight, n, A{0});
  fill_row(lost, n, A{0});
  load_weight(g.param_dtype, g.weight, column, n, weight);
  for (int64_t b = 0; b < g.batch; ++b) {
    const A* runs = static_cast<const A*>(g.partials) + b * g.splits * g.width + column;
    for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
      Vec<A> t = {};
      for (int64_t s = 0; s < g.splits;) {
        Vec<A> part = {};
        for (const int64_t end = smaller(s + kFold, g.splits); s < end; ++s)
          part += load(runs + s * g.width + d, lanes);
        t += part;
      }
      store(total + d, t, lanes);
    });
    load_modulation(g.kind, g.param_dtype, g.modulation.data, b * g.modulation.batch_stride + column, n, value,
                    derivative);
    for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
      const Vec<A> t = load(total + d, lanes);
      const Vec<A> before = load(dweight + d, lanes), term = load(value + d, lanes) * t - load(lost + d, lanes);
      const Vec<A> after = before + term;
      store(lost + d, (after - before) - term, lanes);
      store(dweight + d, after, lanes);
      store(total + d, load(derivative + d, lanes) * load(weight + d, lanes) * t, lanes);
    });
    if (g.dsample) store_params(g.param_dtype, g.dsample, b * g.width + column, n, total);
  }
  if (g.dweight) store_params(g.param_dtype, g.dweight, column, n, dweight);
}

template <class A>
void reduce_param_grads(const ParamGrads& g) {
  if (!g.dsample && !g.dweight) return;
  const int64_t blocks = divide_up(g.width, kColumnBlock);
  parallel(blocks, kColumnBlock * g.batch * g.splits, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      reduce_columns<A>(g, i * kColumnBlock, smaller(kColumnBlock, g.width - i * kColumnBlock));
    }
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
