// gated_residual_norm_modulate on the CPU: gated_residual and the norm_modulate that follows it, in one pass. The maths
// stands in gated_residual_norm_modulate.h.
//
// Forward, 4U: z's norm, then the sum, rounded into `out` and kept, rounded, in a scratch row, then its norm
// and h.
// Backward, 6U, in three passes over two rows at a time while they are in cache: mean(g * ohat) and mean(g); then
// t = dx with all three accumulators and mean(u * zhat), u = t * act(gate) * post_weight; then dz.
#include "gated_residual_norm_modulate.h"

#include "cpu/param_grads.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

constexpr int kGroup = 2;  // rows of a backward that share one pass over the accumulators

// One thread's scratch of a forward.
template <class T>
class Forward {
 public:
  using A = Acc<T>;

  explicit Forward(const GatedResidualNormModulateForward& a)
      : a_(a),
        width_(a.width),
        per_token_(varies(a.gate) || varies(a.scale) || varies(a.shift)),
        scratch_(6, a.width, sizeof(A)),
        out_(a.batch * a.length * width_, width_),
        h_(a.batch * a.length * width_, width_) {
    A** const rows[] = {&post_weight_, &pre_weight_, &post_m_, &m_, &shift_, &sum_};
    for (A** row : rows) *row = scratch_.row<A>(width_);
    load_weight(a.param_dtype, a.post_weight, 0, width_, post_weight_);
    load_weight(a.param_dtype, a.pre_weight, 0, width_, pre_weight_);
    fill_row(shift_, width_, A{0});
  }

  void run(const Run& run) {
    if (!per_token_ && run.batch != sample_) modulate(sample_ = run.batch, 0);
    for (int64_t l = run.begin; l < run.end; ++l) {
      if (per_token_) modulate(run.batch, l);
      a_.norm == Norm::layer ? row<Norm::layer>(run.batch, l) : row<Norm::rms>(run.batch, l);
    }
  }

 private:
  static bool varies(const ConstRows& p) { return p.data && p.token_stride != 0; }

  void modulate(int64_t b, int64_t l) {
    load_modulation(modulation_of(a_.gate_act), a_.param_dtype, a_.gate.data, offset_of(a_.gate, b, l), width_,
                    post_m_);
    multiply_rows(post_m_, post_weight_, width_, post_m_);
    load_modulation(Modulation::scale, a_.param_dtype, a_.scale.data, offset_of(a_.scale, b, l), width_, m_);
    multiply_rows(m_, pre_weight_, width_, m_);
    if (a_.shift.data) load_params(a_.param_dtype, a_.shift.data, offset_of(a_.shift, b, l), width_, shift_);
  }

  template <Norm kNorm>
  void row(int64_t b, int64_t l) {
    const int64_t width = width_, row = b * a_.length + l, next = smaller(l + 1, a_.length - 1);
    const T *x = row_of<T>(a_.x, b, l), *next_x = row_of<T>(a_.x, b, next);
    const T *z = row_of<T>(a_.z, b, l), *next_z = row_of<T>(a_.z, b, next);
    const A *post_m = post_m_, *m = m_, *shift = shift_;
    A* sum = sum_;
    const To<T> out = out_.row(static_cast<T*>(a_.out) + row * width);
    const To<T> h = h_.row(static_cast<T*>(a_.h) + row * width);

    const bool post_norm = a_.post_norm == Norm::rms;
    const A post_rstd = post_norm ? moments<Norm::rms>(z, width, a_.eps).rstd : A{1};
    Sums<A> total;
    sum_vectors<A>(
        width,
        [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
          prefetch(next_z + d);
          const Vec<A> v = load(x + d, lanes) + load(z + d, lanes) * post_rstd * load(post_m + d, lanes);
          store(out + d, v, lanes);
          const Vec<A> stored = rounded<T>(v);
          store(sum + d, stored, lanes);
          total.slots[slot] += kNorm == Norm::layer ? stored : stored * stored;
        },
        total);
    const A first = total.total() / static_cast<A>(width);
    const A mean = kNorm == Norm::layer ? corrected_mean(sum, first, width) : A{0};
    const A variance = kNorm == Norm::layer ? sum_squares(sum, mean, width) / static_cast<A>(width) : first;
    const A rstd = 1 / square_root(variance + static_cast<A>(a_.eps));
    for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
      prefetch(next_x + d);
      store(h + d, (load(sum + d, lanes) - mean) * rstd * load(m + d, lanes) + load(shift + d, lanes), lanes);
    });

    if (post_norm) static_cast<A*>(a_.post_rstd)[row] = post_rstd;
    if (kNorm == Norm::layer) static_cast<A*>(a_.mean)[row] = mean;
    static_cast<A*>(a_.rstd)[row] = rstd;
  }

  const GatedResidualNormModulateForward& a_;
  const int64_t width_;
  const bool per_token_;
  Scratch scratch_;
  Output<T> out_, h_;
  A *post_weight_, *pre_weight_, *post_m_, *m_, *shift_, *sum_;
  int64_t sample_ = -1;
};

// The modulation of one row of a backward, in the accumulation type.
template <class A>
struct Modulated {
  A *scale, *m;            // 1 + scale, and that times pre_weight
  A *act, *dact, *post_m;  // act(gate), act'(gate) * post_weight, act(gate) * post_weight
  A *dscale, *dgate;       // where they are per token
};

template <class T>
struct BackwardRow {
  const T *dout, *dh, *out, *z;
  const T *next_dout, *next_dh, *next_out, *next_z;
  Acc<T> mean, rstd, post_rstd;     // mean is 0 for rms, post_rstd 1 without a post_norm
  Acc<T> mean_go, mean_g, mean_uz;  // mean(g * ohat), mean(g), mean(u * zhat); 0 where there is no such term
  Modulated<Acc<T>> p;
  Acc<T>* t;  // scratch: dx before it is rounded
  To<T> dx, dz;
};

template <class A>
struct Accumulators {
  A *dh_ohat, *dh, *t_zhat;  // A, S, G
};

template <class T>
TWOSTEP_INLINE void norm_sums(BackwardRow<T>& row, int64_t width, bool layer) {
  using A = Acc<T>;
  Sums<A> go, g;
  sum_vectors<A>(
      width,
      [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
        const Vec<A> v = load(row.dh + d, lanes) * load(row.p.m + d, lanes);
        go.slots[slot] += v * (load(row.out + d, lanes) - row.mean);
        g.slots[slot] += v;
      },
      go, g);
  row.mean_go = go.total() * row.rstd / static_cast<A>(width);
  row.mean_g = layer ? g.total() / static_cast<A>(width) : A{0};
}

// dx of kRows rows, their terms of A, S and G, and mean(u * zhat).
template <bool kPerToken, bool kSums, int kRows, class T>
TWOSTEP_INLINE void residual_rows(BackwardRow<T> (&rows)[kRows], const Acc<T>* pre_weight,
                                  const Accumulators<Acc<T>>& sums, int64_t width, bool post_norm) {
  using A = Acc<T>;
  struct {
    Sums<A> rows[kRows];
    TWOSTEP_INLINE void fold() {
      for (Sums<A>& s : rows) s.fold();
    }
  } uz;
  sum_vectors_singly<A>(
      width,
      [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
        Vec<A> sum_a = kSums ? load(sums.dh_ohat + d, lanes) : Vec<A>{};
        Vec<A> sum_s = kSums ? load(sums.dh + d, lanes) : Vec<A>{};
        Vec<A> sum_g = kSums ? load(sums.t_zhat + d, lanes) : Vec<A>{};
        for (int r = 0; r < kRows; ++r) {
          const BackwardRow<T>& row = rows[r];
          prefetch(row.next_dh + d);
          prefetch(row.next_out + d);
          const Vec<A> dh = load(row.dh + d, lanes);
          const Vec<A> ohat = (load(row.out + d, lanes) - row.mean) * row.rstd;
          const Vec<A> g = dh * load(row.p.m + d, lanes);
          const Vec<A> t = load(row.dout + d, lanes) + row.rstd * (g - row.mean_g - ohat * row.mean_go);
          const Vec<A> zhat = load(row.z + d, lanes) * row.post_rstd;
          const Vec<A> dh_ohat = dh * ohat, t_zhat = t * zhat;
          store(row.dx + d, t, lanes);
          store(row.t + d, t, lanes);
          uz.rows[r].slots[slot] += t_zhat * load(row.p.post_m + d, lanes);
          if (kPerToken) {
            store(row.p.dscale + d, dh_ohat * load(pre_weight + d, lanes), lanes);
            store(row.p.dgate + d, t_zhat * load(row.p.dact + d, lanes), lanes);
          }
          sum_a += kPerToken ? dh_ohat * load(row.p.scale + d, lanes) : dh_ohat;
          sum_s += dh;
          sum_g += kPerToken ? t_zhat * load(row.p.act + d, lanes) : t_zhat;
        }
        if (kSums) {
          store(sums.dh_ohat + d, sum_a, lanes);
          store(sums.dh + d, sum_s, lanes);
          store(sums.t_zhat + d, sum_g, lanes);
        }
      },
      uz);
  for (int r = 0; r < kRows; ++r) rows[r].mean_uz = post_norm ? uz.rows[r].total() / static_cast<A>(width) : A{0};
}

template <class T>
TWOSTEP_INLINE void branch_row(const BackwardRow<T>& row, int64_t width) {
  using A = Acc<T>;
  for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch(row.next_dout + d);
    prefetch(row.next_z + d);
    const Vec<A> u = load(row.t + d, lanes) * load(row.p.post_m + d, lanes);
    const Vec<A> zhat = load(row.z + d, lanes) * row.post_rstd;
    store(row.dz + d, row.post_rstd * (u - zhat * row.mean_uz), lanes);
  });
}

// One thread's scratch of a backward. kPerToken: scale or gate is; the other one then counts as a constant row.
template <class T, bool kPerToken, bool kSums>
class Backward {
 public:
  using A = Acc<T>;
  static constexpr int kModulated = kPerToken ? kGroup : 1;  // rows of modulation held at once

  explicit Backward(const GatedResidualNormModulateBackward& a)
      : a_(a),
        width_(a.width),
        scratch_(6 + kGroup + 7 * kModulated, a.width, sizeof(A)),
        dx_(a.batch * a.length * width_, width_),
        dz_(a.batch * a.length * width_, width_) {
    A** const rows[] = {&post_weight_, &pre_weight_, &spare_[0], &spare_[1], &spare_[2]};
    for (A** row : rows) *row = scratch_.row<A>(width_);
    for (A*& t : t_) t = scratch_.row<A>(width_);
    for (Modulated<A>& p : modulated_) {
      A** const fields[] = {&p.scale, &p.m, &p.act, &p.dact, &p.post_m, &p.dscale, &p.dgate};
      for (A** row : fields) *row = scratch_.row<A>(width_);
    }
    load_weight(a.param_dtype, a.post_weight, 0, width_, post_weight_);
    load_weight(a.param_dtype, a.pre_weight, 0, width_, pre_weight_);
    if (!a.dout.data) {
      T* zeros = scratch_.row<T>(width_);
      for (int64_t d = 0; d < width_; ++d) zeros[d] = T{};
      zeros_ = zeros;
    }
  }

  void run(const Run& run) {
    if (!kPerToken && run.batch != sample_) modulate(sample_ = run.batch, 0, modulated_[0]);
    const Accumulators<A> sums = {plane(run, 0, a_.dpre_weight || (a_.dscale && !a_.scale_per_token)),
                                  plane(run, 1, a_.dshift),
                                  plane(run, 2, a_.dpost_weight || (a_.dgate && !a_.gate_per_token))};
    int64_t l = run.begin;
    for (; l + kGroup <= run.end; l += kGroup) rows<kGroup>(run, l, sums);
    for (; l < run.end; ++l) rows<1>(run, l, sums);
  }

 private:
  void modulate(int64_t b, int64_t l, const Modulated<A>& p) {
    load_modulation(Modulation::scale, a_.param_dtype, a_.scale.data, offset_of(a_.scale, b, l), width_, p.scale);
    multiply_rows(p.scale, pre_weight_, width_, p.m);
    load_modulation(modulation_of(a_.gate_act), a_.param_dtype, a_.gate.data, offset_of(a_.gate, b, l), width_, p.act,
                    p.dact);
    multiply_rows(p.act, post_weight_, width_, p.post_m);
    multiply_rows(p.dact, post_weight_, width_, p.dact);
    // Where only the other one is per token, this one's sum stays bare: the second stage multiplies it.
    if (kPerToken && !a_.scale_per_token) fill_row(p.scale, width_, A{1});
    if (kPerToken && !a_.gate_per_token) fill_row(p.act, width_, A{1});
  }

  // The run's row of partial sums; a spare row where nobody wants them.
  A* plane(const Run& run, int64_t plane, bool wanted) {
    if (!kSums) return nullptr;
    const int64_t row = (plane * a_.batch + run.batch) * a_.partials.splits + run.split;
    A* out = wanted ? static_cast<A*>(a_.partials.data) + row * width_ : spare_[plane];
    fill_row(out, width_, A{0});
    return out;
  }

  const T* dout(int64_t b, int64_t l) const { return zeros_ ? zeros_ : row_of<T>(a_.dout, b, l); }

  template <int kRows>
  void rows(const Run& run, int64_t l, const Accumulators<A>& sums) {
    const bool layer = a_.norm == Norm::layer, post_norm = a_.post_norm == Norm::rms;
    const int64_t b = run.batch, first = b * a_.length + l;
    T* dx = static_cast<T*>(a_.dx) + first * width_;
    T* dz = static_cast<T*>(a_.dz) + first * width_;
    BackwardRow<T> group[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      const Modulated<A>& p = modulated_[kPerToken ? r : 0];
      if (kPerToken) modulate(b, l + r, p);
      const int64_t next = smaller(l + r + kRows, a_.length - 1), i = first + r;
      group[r] = {dout(b, l + r),
                  row_of<T>(a_.dh, b, l + r),
                  row_of<T>(a_.out, b, l + r),
                  row_of<T>(a_.z, b, l + r),
                  dout(b, next),
                  row_of<T>(a_.dh, b, next),
                  row_of<T>(a_.out, b, next),
                  row_of<T>(a_.z, b, next),
                  layer ? static_cast<const A*>(a_.mean)[i] : A{0},
                  static_cast<const A*>(a_.rstd)[i],
                  post_norm ? static_cast<const A*>(a_.post_rstd)[i] : A{1},
                  A{0},
                  A{0},
                  A{0},
                  p,
                  t_[r],
                  dx_.row(dx + r * width_),
                  dz_.row(dz + r * width_)};
      norm_sums(group[r], width_, layer);
    }
    residual_rows<kPerToken, kSums>(group, pre_weight_, sums, width_, post_norm);
    for (int r = 0; r < kRows; ++r) {
      branch_row(group[r], width_);
      const int64_t offset = (first + r) * width_;
      if (a_.scale_per_token && a_.dscale) store_params(a_.param_dtype, a_.dscale, offset, width_, group[r].p.dscale);
      if (a_.gate_per_token && a_.dgate) store_params(a_.param_dtype, a_.dgate, offset, width_, group[r].p.dgate);
    }
  }

  const GatedResidualNormModulateBackward& a_;
  const int64_t width_;
  Scratch scratch_;
  Output<T> dx_, dz_;
  A *post_weight_, *pre_weight_, *spare_[3], *t_[kGroup];
  const T* zeros_ = nullptr;
  Modulated<A> modulated_[kModulated];
  int64_t sample_ = -1;
};

template <class T, bool kPerToken, bool kSums>
void backward(const GatedResidualNormModulateBackward& a) {
  const Runs runs = kSums ? split_runs(a.batch, a.length, a.partials.splits) : short_runs(a.batch, a.length, a.width);
  parallel(runs.count(), runs.rows * a.width, [=, &a](int64_t first, int64_t last) {
    Backward<T, kPerToken, kSums> worker(a);
    for (int64_t i = first; i < last; ++i) worker.run(runs[i]);
  });
}

template <class A>
void reduce(const GatedResidualNormModulateBackward& a) {
  const int64_t splits = a.partials.splits, plane = a.batch * splits * a.width;
  const A* sums = static_cast<const A*>(a.partials.data);
  reduce_param_grads<A>({sums, a.batch, splits, a.width, a.param_dtype, Modulation::scale, a.pre_weight,
                         a.scale_per_token ? ConstRows{} : a.scale, a.scale_per_token ? nullptr : a.dscale,
                         a.dpre_weight});
  reduce_param_grads<A>(
      {sums + plane, a.batch, splits, a.width, a.param_dtype, Modulation::scale, nullptr, {}, a.dshift, nullptr});
  reduce_param_grads<A>({sums + 2 * plane, a.batch, splits, a.width, a.param_dtype, modulation_of(a.gate_act),
                         a.post_weight, a.gate_per_token ? ConstRows{} : a.gate, a.gate_per_token ? nullptr : a.dgate,
                         a.dpost_weight});
}

}  // namespace

void gated_residual_norm_modulate_forward(const GatedResidualNormModulateForward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Runs runs = short_runs(a.batch, a.length, a.width);
    parallel(runs.count(), runs.rows * a.width, [=, &a](int64_t first, int64_t last) {
      Forward<T> worker(a);
      for (int64_t i = first; i < last; ++i) worker.run(runs[i]);
    });
  });
}

void gated_residual_norm_modulate_backward(const GatedResidualNormModulateBackward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool sums = a.dpost_weight || a.dpre_weight || a.dshift || (a.dscale && !a.scale_per_token) ||
                      (a.dgate && !a.gate_per_token);
    if (a.scale_per_token || a.gate_per_token) {
      sums ? backward<T, true, true>(a) : backward<T, true, false>(a);
    } else {
      sums ? backward<T, false, true>(a) : backward<T, false, false>(a);
    }
    if (sums) reduce<Acc<T>>(a);
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
