// norm_modulate on the CPU: y = norm(x) * weight * (1 + scale) + shift. The maths stands in norm_modulate.h.
//
// Forward, 2U: a row is read from memory by the sums of its norm and is in the first-level cache when it is written.
// weight * (1 + scale) is one fp32 row, made once a sample, or once a row where the modulation is per token.
// Backward, 3U: first mean(g * xhat) and mean(g) of two rows, then dx of both and their terms of A and S. Two rows at
// a time halve the traffic to the accumulators, which at width 3840 do not fit the first-level cache beside the rows.
#include "norm_modulate.h"

#include "cpu/param_grads.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

constexpr int kGroup = 2;  // rows of a backward that share one pass over the accumulators

template <class T, Norm kNorm>
TWOSTEP_INLINE Moments<Acc<T>> forward_row(const T* x, const T* next_x, const Acc<T>* m, const Acc<T>* shift,
                                           int64_t width, double eps, To<T> y) {
  using A = Acc<T>;
  const Moments<A> s = moments<kNorm>(x, width, eps);
  for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch(next_x + d);
    const Vec<A> v = kNorm == Norm::layer ? load(x + d, lanes) - s.mean : load(x + d, lanes);
    store(y + d, v * s.rstd * load(m + d, lanes) + load(shift + d, lanes), lanes);
  });
  return s;
}

template <class T, Norm kNorm>
void forward(const NormModulateForward& a) {
  using A = Acc<T>;
  const int64_t width = a.width;
  const bool per_token = (a.scale.data && a.scale.token_stride != 0) || (a.shift.data && a.shift.token_stride != 0);
  const Runs runs = short_runs(a.batch, a.length, width);
  parallel(runs.count(), runs.rows * width, [=, &a](int64_t first, int64_t last) {
    Scratch scratch(3, width, sizeof(A));
    A* weight = scratch.row<A>(width);
    A* m = scratch.row<A>(width);
    A* shift = scratch.row<A>(width);
    const Output<T> out(a.batch * a.length * width, width);
    load_weight(a.param_dtype, a.weight, 0, width, weight);
    fill_row(shift, width, A{0});
    const auto modulate = [&](int64_t b, int64_t l) {
      load_modulation(Modulation::scale, a.param_dtype, a.scale.data, offset_of(a.scale, b, l), width, m);
      multiply_rows(m, weight, width, m);
      if (a.shift.data) load_params(a.param_dtype, a.shift.data, offset_of(a.shift, b, l), width, shift);
    };
    int64_t sample = -1;
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      if (!per_token && run.batch != sample) modulate(sample = run.batch, 0);
      for (int64_t l = run.begin; l < run.end; ++l) {
        if (per_token) modulate(run.batch, l);
        const int64_t row = run.batch * a.length + l;
        T* y = static_cast<T*>(a.y) + row * width;
        const Moments<A> s =
            forward_row<T, kNorm>(row_of<T>(a.x, run.batch, l), row_of<T>(a.x, run.batch, smaller(l + 1, a.length - 1)),
                                  m, shift, width, a.eps, out.row(y));
        if (kNorm == Norm::layer) static_cast<A*>(a.mean)[row] = s.mean;
        static_cast<A*>(a.rstd)[row] = s.rstd;
      }
    }
  });
}

template <class T>
struct BackwardRow {
  const T *dy, *x, *next_dy, *next_x;
  Acc<T> mean, rstd;         // mean is 0 for rms
  Acc<T> mean_gx, mean_g;    // mean(g * xhat), mean(g); the latter 0 for rms
  const Acc<T>* m;           // weight * (1 + scale)
  const Acc<T>* modulation;  // 1 + scale, used where it is per token
  Acc<T>* dscale;            // where it is per token: dy * xhat * weight
  To<T> dx;
};

template <class T>
TWOSTEP_INLINE void backward_sums(BackwardRow<T>& row, int64_t width, bool layer) {
  using A = Acc<T>;
  Sums<A> gx, g;
  sum_vectors<A>(
      width,
      [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
        const Vec<A> v = load(row.dy + d, lanes) * load(row.m + d, lanes);
        gx.slots[slot] += v * (load(row.x + d, lanes) - row.mean);
        g.slots[slot] += v;
      },
      gx, g);
  row.mean_gx = gx.total() * row.rstd / static_cast<A>(width);
  row.mean_g = layer ? g.total() / static_cast<A>(width) : A{0};
}

// dx of kRows rows; their terms are added to sum_gx (A) and sum_g (S).
template <bool kPerToken, bool kSums, int kRows, class T>
TWOSTEP_INLINE void backward_rows(const BackwardRow<T> (&rows)[kRows], const Acc<T>* weight, Acc<T>* sum_gx,
                                  Acc<T>* sum_g, int64_t width) {
  using A = Acc<T>;
  for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    Vec<A> a = kSums ? load(sum_gx + d, lanes) : Vec<A>{};
    Vec<A> s = kSums ? load(sum_g + d, lanes) : Vec<A>{};
    for (int r = 0; r < kRows; ++r) {
      const BackwardRow<T>& row = rows[r];
      prefetch(row.next_dy + d);
      prefetch(row.next_x + d);
      const Vec<A> dy = load(row.dy + d, lanes);
      const Vec<A> xhat = (load(row.x + d, lanes) - row.mean) * row.rstd;
      const Vec<A> g = dy * load(row.m + d, lanes);
      store(row.dx + d, row.rstd * (g - row.mean_g - xhat * row.mean_gx), lanes);
      const Vec<A> product = dy * xhat;
      if (kPerToken) store(row.dscale + d, product * load(weight + d, lanes), lanes);
      a += kPerToken ? product * load(row.modulation + d, lanes) : product;
      s += dy;
    }
    if (kSums) {
      store(sum_gx + d, a, lanes);
      store(sum_g + d, s, lanes);
    }
  });
}

// One thread's rows of scratch and what it needs to turn row l of sample b into gradients.
template <class T, bool kPerToken, bool kSums>
class Backward {
 public:
  using A = Acc<T>;

  explicit Backward(const NormModulateBackward& a)
      : a_(a),
        width_(a.width),
        scratch_(3 + 3 * kGroup, a.width, sizeof(A)),
        weight_(scratch_.row<A>(width_)),
        spare_{scratch_.row<A>(width_), scratch_.row<A>(width_)},
        dx_(a.batch * a.length * width_, width_) {
    for (int r = 0; r < kGroup; ++r) {
      modulation_[r] = scratch_.row<A>(width_);
      m_[r] = scratch_.row<A>(width_);
      dscale_[r] = scratch_.row<A>(width_);
    }
    load_weight(a.param_dtype, a.weight, 0, width_, weight_);
  }

  void run(const Run& run) {
    if (!kPerToken && run.batch != sample_) modulate(sample_ = run.batch, 0, 0);
    A* sum_gx = sums(run, 0, a_.dweight || (a_.dscale && !kPerToken));
    A* sum_g = sums(run, 1, a_.dshift);
    int64_t l = run.begin;
    for (; l + kGroup <= run.end; l += kGroup) rows<kGroup>(run, l, sum_gx, sum_g);
    for (; l < run.end; ++l) rows<1>(run, l, sum_gx, sum_g);
  }

 private:
  void modulate(int64_t b, int64_t l, int r) {
    load_modulation(Modulation::scale, a_.param_dtype, a_.scale.data, offset_of(a_.scale, b, l), width_,
                    modulation_[r]);
    multiply_rows(modulation_[r], weight_, width_, m_[r]);
  }

  // The run's row of partial sums; a spare row where nobody wants them.
  A* sums(const Run& run, int64_t plane, bool wanted) {
    if (!kSums) return nullptr;
    const int64_t row = (plane * a_.batch + run.batch) * a_.partials.splits + run.split;
    A* out = wanted ? static_cast<A*>(a_.partials.data) + row * width_ : spare_[plane];
    fill_row(out, width_, A{0});
    return out;
  }

  template <int kRows>
  void rows(const Run& run, int64_t l, A* sum_gx, A* sum_g) {
    const bool layer = a_.norm == Norm::layer;
    const int64_t first = run.batch * a_.length + l;
    T* dx = static_cast<T*>(a_.dx) + first * width_;
    BackwardRow<T> group[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      if (kPerToken) modulate(run.batch, l + r, r);
      const int64_t next = smaller(l + r + kRows, a_.length - 1);
      const int64_t i = first + r;
      const int m = kPerToken ? r : 0;
      group[r] = {row_of<T>(a_.dy, run.batch, l + r),
                  row_of<T>(a_.x, run.batch, l + r),
                  row_of<T>(a_.dy, run.batch, next),
                  row_of<T>(a_.x, run.batch, next),
                  layer ? static_cast<const A*>(a_.mean)[i] : A{0},
                  static_cast<const A*>(a_.rstd)[i],
                  A{0},
                  A{0},
                  m_[m],
                  modulation_[m],
                  dscale_[r],
                  dx_.row(dx + r * width_)};
      backward_sums(group[r], width_, layer);
    }
    backward_rows<kPerToken, kSums>(group, weight_, sum_gx, sum_g, width_);
    for (int r = 0; r < kRows; ++r) {
      if (kPerToken && a_.dscale) {
        store_params(a_.param_dtype, a_.dscale, (first + r) * width_, width_, dscale_[r]);
      }
    }
  }

  const NormModulateBackward& a_;
  const int64_t width_;
  Scratch scratch_;
  A* weight_;
  A* spare_[2];
  Output<T> dx_;
  A *modulation_[kGroup], *m_[kGroup], *dscale_[kGroup];
  int64_t sample_ = -1;
};

template <class T, bool kPerToken, bool kSums>
void backward(const NormModulateBackward& a) {
  const Runs runs = kSums ? split_runs(a.batch, a.length, a.partials.splits) : short_runs(a.batch, a.length, a.width);
  parallel(runs.count(), runs.rows * a.width, [=, &a](int64_t first, int64_t last) {
    Backward<T, kPerToken, kSums> worker(a);
    for (int64_t i = first; i < last; ++i) worker.run(runs[i]);
  });
}

template <class A>
void reduce(const NormModulateBackward& a) {
  const int64_t splits = a.partials.splits;
  const A* sum_gx = static_cast<const A*>(a.partials.data);
  const A* sum_g = sum_gx + a.batch * splits * a.width;
  const ConstRows scale = a.scale_per_token ? ConstRows{} : a.scale;
  reduce_param_grads<A>({sum_gx, a.batch, splits, a.width, a.param_dtype, Modulation::scale, a.weight, scale,
                         a.scale_per_token ? nullptr : a.dscale, a.dweight});
  reduce_param_grads<A>(
      {sum_g, a.batch, splits, a.width, a.param_dtype, Modulation::scale, nullptr, {}, a.dshift, nullptr});
}

}  // namespace

void norm_modulate_forward(const NormModulateForward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    a.norm == Norm::layer ? forward<T, Norm::layer>(a) : forward<T, Norm::rms>(a);
  });
}

void norm_modulate_backward(const NormModulateBackward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool sums = a.dweight || a.dshift || (a.dscale && !a.scale_per_token);
    if (a.scale_per_token) {
      sums ? backward<T, true, true>(a) : backward<T, true, false>(a);
    } else {
      sums ? backward<T, false, true>(a) : backward<T, false, false>(a);
    }
    if (sums) reduce<Acc<T>>(a);
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
