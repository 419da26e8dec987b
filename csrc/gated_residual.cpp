// gated_residual on the CPU: out = x + act(gate) * norm(z) * weight. The maths stands in gated_residual.h.
//
// Forward, 3U, and backward, 3U: as norm_modulate.cpp has them. Without a norm there is nothing to sum and one pass
// does. act(gate) * weight is one fp32 row a sample (a row where the gate is per token), so tanh costs nothing.
#include "gated_residual.h"

#include "cpu/param_grads.h"

namespace twostep::cpu::TWOSTEP_ISA {

namespace {

constexpr int kGroup = 2;  // rows of a backward that share one pass over the accumulator

template <class T>
TWOSTEP_INLINE void forward_row(const T* x, const T* z, const T* next_x, const T* next_z, const Acc<T>* m, Acc<T> rstd,
                                int64_t width, To<T> out) {
  using A = Acc<T>;
  for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    prefetch(next_x + d);
    prefetch(next_z + d);
    store(out + d, load(x + d, lanes) + load(z + d, lanes) * rstd * load(m + d, lanes), lanes);
  });
}

template <class T>
void forward(const GatedResidualForward& a) {
  using A = Acc<T>;
  const int64_t width = a.width;
  const bool per_token = a.gate.data && a.gate.token_stride != 0;
  const Runs runs = short_runs(a.batch, a.length, width);
  parallel(runs.count(), runs.rows * width, [=, &a](int64_t first, int64_t last) {
    Scratch scratch(2, width, sizeof(A));
    A* weight = scratch.row<A>(width);
    A* m = scratch.row<A>(width);
    const Output<T> output(a.batch * a.length * width, width);
    load_weight(a.param_dtype, a.weight, 0, width, weight);
    const auto modulate = [&](int64_t b, int64_t l) {
      load_modulation(modulation_of(a.gate_act), a.param_dtype, a.gate.data, offset_of(a.gate, b, l), width, m);
      multiply_rows(m, weight, width, m);
    };
    int64_t sample = -1;
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      if (!per_token && run.batch != sample) modulate(sample = run.batch, 0);
      for (int64_t l = run.begin; l < run.end; ++l) {
        if (per_token) modulate(run.batch, l);
        const int64_t next = smaller(l + 1, a.length - 1);
        const T *x = row_of<T>(a.x, run.batch, l), *next_x = row_of<T>(a.x, run.batch, next);
        const T *z = row_of<T>(a.z, run.batch, l), *next_z = row_of<T>(a.z, run.batch, next);
        const A rstd = a.norm == Norm::rms ? moments<Norm::rms>(z, width, a.eps).rstd : A{1};
        const int64_t row = run.batch * a.length + l;
        forward_row(x, z, next_x, next_z, m, rstd, width, output.row(static_cast<T*>(a.out) + row * width));
        if (a.norm == Norm::rms) static_cast<A*>(a.rstd)[row] = rstd;
      }
    }
  });
}

template <class T>
struct BackwardRow {
  const T *dout, *z, *next_dout, *next_z;
  Acc<T> rstd;      // 1 without a norm
  Acc<T> mean_gz;   // mean(g * zhat), with a norm
  const Acc<T>* m;  // act(gate) * weight
  // Where the gate is per token: act(gate), act'(gate) * weight, and dgate.
  const Acc<T>*act, *dact;
  Acc<T>* dgate;
  To<T> dz;
};

template <class T>
TWOSTEP_INLINE void backward_sum(BackwardRow<T>& row, int64_t width) {
  using A = Acc<T>;
  Sums<A> gz;
  sum_vectors<A>(
      width,
      [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
        gz.slots[slot] += load(row.dout + d, lanes) * load(row.m + d, lanes) * load(row.z + d, lanes);
      },
      gz);
  row.mean_gz = gz.total() * row.rstd / static_cast<A>(width);
}

// dz of kRows rows; their terms are added to sum_gz (A). Without a norm dz does not look at z, which may be infinite.
template <bool kNorm, bool kPerToken, bool kSums, int kRows, class T>
TWOSTEP_INLINE void backward_rows(const BackwardRow<T> (&rows)[kRows], Acc<T>* sum_gz, int64_t width) {
  using A = Acc<T>;
  for_vectors<A>(width, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
    Vec<A> a = kSums ? load(sum_gz + d, lanes) : Vec<A>{};
    for (int r = 0; r < kRows; ++r) {
      const BackwardRow<T>& row = rows[r];
      prefetch(row.next_dout + d);
      prefetch(row.next_z + d);
      const Vec<A> dout = load(row.dout + d, lanes);
      const Vec<A> zhat = load(row.z + d, lanes) * row.rstd;
      const Vec<A> g = dout * load(row.m + d, lanes);
      store(row.dz + d, kNorm ? row.rstd * (g - zhat * row.mean_gz) : g, lanes);
      const Vec<A> product = dout * zhat;
      if (kPerToken) store(row.dgate + d, product * load(row.dact + d, lanes), lanes);
      a += kPerToken ? product * load(row.act + d, lanes) : product;
    }
    if (kSums) store(sum_gz + d, a, lanes);
  });
}

// One thread's rows of scratch and what it needs to turn row l of sample b into gradients.
template <class T, bool kPerToken, bool kSums>
class Backward {
 public:
  using A = Acc<T>;

  explicit Backward(const GatedResidualBackward& a)
      : a_(a),
        width_(a.width),
        scratch_(1 + 4 * kGroup, a.width, sizeof(A)),
        weight_(scratch_.row<A>(width_)),
        dz_(a.batch * a.length * width_, width_) {
    for (int r = 0; r < kGroup; ++r) {
      act_[r] = scratch_.row<A>(width_);
      dact_[r] = scratch_.row<A>(width_);
      m_[r] = scratch_.row<A>(width_);
      dgate_[r] = scratch_.row<A>(width_);
    }
    load_weight(a.param_dtype, a.weight, 0, width_, weight_);
  }

  void run(const Run& run) {
    if (!kPerToken && run.batch != sample_) modulate(sample_ = run.batch, 0, 0);
    A* sum_gz = nullptr;
    if (kSums) {
      sum_gz = static_cast<A*>(a_.partials.data) + (run.batch * a_.partials.splits + run.split) * width_;
      fill_row(sum_gz, width_, A{0});
    }
    int64_t l = run.begin;
    for (; l + kGroup <= run.end; l += kGroup) rows<kGroup>(run, l, sum_gz);
    for (; l < run.end; ++l) rows<1>(run, l, sum_gz);
  }

 private:
  void modulate(int64_t b, int64_t l, int r) {
    load_modulation(modulation_of(a_.gate_act), a_.param_dtype, a_.gate.data, offset_of(a_.gate, b, l), width_, act_[r],
                    dact_[r]);
    multiply_rows(act_[r], weight_, width_, m_[r]);
    multiply_rows(dact_[r], weight_, width_, dact_[r]);
  }

  template <int kRows>
  void rows(const Run& run, int64_t l, A* sum_gz) {
    const bool norm = a_.norm == Norm::rms;
    const int64_t first = run.batch * a_.length + l;
    T* dz = static_cast<T*>(a_.dz) + first * width_;
    BackwardRow<T> group[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      if (kPerToken) modulate(run.batch, l + r, r);
      const int64_t next = smaller(l + r + kRows, a_.length - 1);
      const int p = kPerToken ? r : 0;
      group[r] = {row_of<T>(a_.dout, run.batch, l + r),
                  row_of<T>(a_.z, run.batch, l + r),
                  row_of<T>(a_.dout, run.batch, next),
                  row_of<T>(a_.z, run.batch, next),
                  norm ? static_cast<const A*>(a_.rstd)[first + r] : A{1},
                  A{0},
                  m_[p],
                  act_[p],
                  dact_[p],
                  dgate_[r],
                  dz_.row(dz + r * width_)};
      if (norm) backward_sum(group[r], width_);
    }
    norm ? backward_rows<true, kPerToken, kSums>(group, sum_gz, width_)
         : backward_rows<false, kPerToken, kSums>(group, sum_gz, width_);
    for (int r = 0; r < kRows; ++r) {
      if (kPerToken && a_.dgate) store_params(a_.param_dtype, a_.dgate, (first + r) * width_, width_, dgate_[r]);
    }
  }

  const GatedResidualBackward& a_;
  const int64_t width_;
  Scratch scratch_;
  A* weight_;
  Output<T> dz_;
  A *act_[kGroup], *dact_[kGroup], *m_[kGroup], *dgate_[kGroup];
  int64_t sample_ = -1;
};

template <class T, bool kPerToken, bool kSums>
void backward(const GatedResidualBackward& a) {
  const Runs runs = kSums ? split_runs(a.batch, a.length, a.partials.splits) : short_runs(a.batch, a.length, a.width);
  parallel(runs.count(), runs.rows * a.width, [=, &a](int64_t first, int64_t last) {
    Backward<T, kPerToken, kSums> worker(a);
    for (int64_t i = first; i < last; ++i) worker.run(runs[i]);
  });
}

}  // namespace

void gated_residual_forward(const GatedResidualForward& a) {
  with_type(a.dtype, [&](auto type) { forward<typename decltype(type)::type>(a); });
}

void gated_residual_backward(const GatedResidualBackward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool sums = a.dweight || (a.dgate && !a.gate_per_token);
    if (a.gate_per_token) {
      sums ? backward<T, true, true>(a) : backward<T, true, false>(a);
    } else {
      sums ? backward<T, false, true>(a) : backward<T, false, false>(a);
    }
    if (sums) {
      reduce_param_grads<Acc<T>>({a.partials.data, a.batch, a.partials.splits, a.width, a.param_dtype,
                                  modulation_of(a.gate_act), a.weight, a.gate_per_token ? ConstRows{} : a.gate,
                                  a.gate_per_token ? nullptr : a.dgate, a.dweight});
    }
  });
}

}  // namespace twostep::cpu::TWOSTEP_ISA
