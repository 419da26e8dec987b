// qk_norm_rope on the CPU: RMSNorm of each head of q and k, then rotary embedding. The maths stands in qk_norm_rope.h;
// cpu/rotary.h has the rotation's vector form.
//
// Forward 4U, backward 6U, and the table. A token is the unit: its table row is spread once for all heads of q and of
// k, each head is read from memory by its sums and again from the first-level cache. The backward takes sum(x^2) and
// sum(g * x) in the same pass, keeping dn in a scratch row.
#include "qk_norm_rope.h"

#include "cpu/param_grads.h"
#include "cpu/rotary.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

template <class T>
TWOSTEP_INLINE Acc<T> head_rstd(const T* x, int64_t width, double eps) {
  return moments<Norm::rms>(x, width, eps).rstd;
}

template <class T>
TWOSTEP_INLINE void forward_head(const T* x, const T* ahead, Acc<T> rstd, const Acc<T>* weight,
                                 const Rotation<Acc<T>>& rotation, int64_t width, To<T> y) {
  for_vectors<Acc<T>>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch(ahead + d);
    store(y + d, rotation.rotate(load(x + d, lanes) * rstd * load(weight + d, lanes), d, lanes), lanes);
  });
}

// All heads of one token, kHeadBlock at a time: their sums do not wait for each other, so the long chain from the last
// product to 1 / sqrt is hidden.
constexpr int kHeadBlock = 8;
template <class T>
TWOSTEP_INLINE void forward_token(const T* x, const T* next_x, int64_t head_stride, int64_t heads, const Acc<T>* weight,
                                  const Rotation<Acc<T>>& rotation, int64_t width, double eps, To<T> y) {
  Acc<T> rstd[kHeadBlock];
  for (int64_t first = 0; first < heads; first += kHeadBlock) {
    const int64_t n = smaller(kHeadBlock, heads - first);
    for (int64_t i = 0; i < n; ++i) rstd[i] = head_rstd(x + (first + i) * head_stride, width, eps);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t h = first + i;
      forward_head(x + h * head_stride, next_x + h * head_stride, rstd[i], weight, rotation, width, y + h * width);
    }
  }
}

template <class T>
void forward(const QkNormRopeForward& a) {
  using A = Acc<T>;
  const int64_t width = a.width, q_token = a.q.heads * width, k_token = a.k.heads * width;
  const Runs runs = short_runs(a.batch, a.length, q_token + k_token);
  parallel(runs.count(), runs.rows * (q_token + k_token), [=, &a](int64_t first, int64_t last) {
    Scratch scratch(4, width, sizeof(A));
    Rotation<A> rotation(scratch, width);
    A* q_weight = scratch.row<A>(width);
    A* k_weight = scratch.row<A>(width);
    const Output<T> q_out(a.batch * a.length * q_token, width);
    const Output<T> k_out(a.batch * a.length * k_token, width);
    load_weight(a.param_dtype, a.q_weight, 0, width, q_weight);
    load_weight(a.param_dtype, a.k_weight, 0, width, k_weight);
    const auto token = [&](const ConstHeads& x, const A* weight, const Output<T>& out, void* y, int64_t b, int64_t l) {
      const T* heads = head_of<T>(x, b, l, 0);
      const T* next = head_of<T>(x, b, smaller(l + 1, a.length - 1), 0);  // asked for a token ahead
      const To<T> row = out.row(static_cast<T*>(y) + (b * a.length + l) * x.heads * width);
      // 128, the width of every model we know, as a constant: the loops unroll and a head stays in registers.
      if (width == 128) {
        forward_token(heads, next, x.head_stride, x.heads, weight, rotation, 128, a.eps, row);
      } else {
        forward_token(heads, next, x.head_stride, x.heads, weight, rotation, width, a.eps, row);
      }
    };
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      for (int64_t l = run.begin; l < run.end; ++l) {
        rotation.spread(row_of<A>(a.freqs, run.batch, l), width, false);
        token(a.q, q_weight, q_out, a.q_out, run.batch, l);
        token(a.k, k_weight, k_out, a.k_out, run.batch, l);
      }
    }
  });
}

// dx of one head; its dn * xhat is added to sum_dn where that is not null. dn is a scratch row.
template <bool kSums, class T>
TWOSTEP_INLINE void backward_head(const T* dy, const T* x, const T* next_dy, const T* next_x, const Acc<T>* weight,
                                  const Rotation<Acc<T>>& inverse, int64_t width, double eps, Acc<T>* dn,
                                  Acc<T>* sum_dn, To<T> dx) {
  using A = Acc<T>;
  Sums<A> xx, gx;
  sum_vectors<A>(
      width,
      [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
        const Vec<A> v = load(x + d, lanes);
        const Vec<A> n = inverse.rotate(load(dy + d, lanes), d, lanes);
        store(dn + d, n, lanes);
        xx.slots[slot] += v * v;
        gx.slots[slot] += n * load(weight + d, lanes) * v;
      },
      xx, gx);
  const A rstd = 1 / square_root(xx.total() / static_cast<A>(width) + static_cast<A>(eps));
  const A mean_gx = gx.total() * rstd / static_cast<A>(width);
  for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch(next_dy + d);
    prefetch(next_x + d);
    const Vec<A> n = load(dn + d, lanes);
    const Vec<A> xhat = load(x + d, lanes) * rstd;
    if (kSums) store(sum_dn + d, load(sum_dn + d, lanes) + n * xhat, lanes);
    store(dx + d, rstd * (n * load(weight + d, lanes) - xhat * mean_gx), lanes);
  });
}

template <class T, bool kSums>
void backward(const QkNormRopeBackward& a) {
  using A = Acc<T>;
  const int64_t width = a.width, q_token = a.q.heads * width, k_token = a.k.heads * width;
  const Runs runs =
      kSums ? split_runs(a.batch, a.length, a.partials.splits) : short_runs(a.batch, a.length, q_token + k_token);
  parallel(runs.count(), runs.rows * (q_token + k_token), [=, &a](int64_t first, int64_t last) {
    Scratch scratch(6, width, sizeof(A));
    Rotation<A> inverse(scratch, width);
    A* q_weight = scratch.row<A>(width);
    A* k_weight = scratch.row<A>(width);
    A* dn = scratch.row<A>(width);
    A* spare = scratch.row<A>(width);
    const Output<T> dq(a.batch * a.length * q_token, width);
    const Output<T> dk(a.batch * a.length * k_token, width);
    load_weight(a.param_dtype, a.q_weight, 0, width, q_weight);
    load_weight(a.param_dtype, a.k_weight, 0, width, k_weight);
    const auto sums = [&](int64_t plane, const Run& run, bool wanted) -> A* {
      if (!kSums) return nullptr;
      const int64_t row = (plane * a.batch + run.batch) * a.partials.splits + run.split;
      A* out = wanted ? static_cast<A*>(a.partials.data) + row * width : spare;
      fill_row(out, width, A{0});
      return out;
    };
    const auto token = [&](const ConstHeads& dy, const ConstHeads& x, const A* weight, const Output<T>& out, void* dx,
                           A* sum_dn, int64_t b, int64_t l) {
      const To<T> row = out.row(static_cast<T*>(dx) + (b * a.length + l) * x.heads * width);
      const int64_t next = smaller(l + 1, a.length - 1);  // asked for a token ahead
      for (int64_t h = 0; h < x.heads; ++h) {
        const T *dy_head = head_of<T>(dy, b, l, h), *x_head = head_of<T>(x, b, l, h);
        const T *next_dy = head_of<T>(dy, b, next, h), *next_x = head_of<T>(x, b, next, h);
        if (width == 128) {
          backward_head<kSums>(dy_head, x_head, next_dy, next_x, weight, inverse, 128, a.eps, dn, sum_dn,
                               row + h * 128);
        } else {
          backward_head<kSums>(dy_head, x_head, next_dy, next_x, weight, inverse, width, a.eps, dn, sum_dn,
                               row + h * width);
        }
      }
    };
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      A* q_sums = sums(0, run, a.dq_weight);
      A* k_sums = sums(1, run, a.dk_weight);
      for (int64_t l = run.begin; l < run.end; ++l) {
        inverse.spread(row_of<A>(a.freqs, run.batch, l), width, true);
        token(a.dq_out, a.q, q_weight, dq, a.dq, q_sums, run.batch, l);
        token(a.dk_out, a.k, k_weight, dk, a.dk, k_sums, run.batch, l);
      }
    }
  });
}

template <class A>
void reduce(const QkNormRopeBackward& a) {
  const int64_t splits = a.partials.splits;
  const A* q_sums = static_cast<const A*>(a.partials.data);
  const A* k_sums = q_sums + a.batch * splits * a.width;
  // No modulation: dweight = sum_b P[b].
  reduce_param_grads<A>(
      {q_sums, a.batch, splits, a.width, a.param_dtype, Modulation::scale, nullptr, {}, nullptr, a.dq_weight});
  reduce_param_grads<A>(
      {k_sums, a.batch, splits, a.width, a.param_dtype, Modulation::scale, nullptr, {}, nullptr, a.dk_weight});
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a) {
  with_type(a.dtype, [&](auto type) { forward<typename decltype(type)::type>(a); });
}

void qk_norm_rope_backward(const QkNormRopeBackward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool sums = a.dq_weight || a.dk_weight;
    sums ? backward<T, true>(a) : backward<T, false>(a);
    if (sums) reduce<Acc<T>>(a);
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
