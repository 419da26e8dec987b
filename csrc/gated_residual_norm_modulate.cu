// gated_residual_norm_modulate on CUDA; the maths and the bytes are in gated_residual_norm_modulate.h.
//
// A team per row, runs of rows per team (cuda/rows.cuh). Both directions chain two reductions: forward, z's norm
// decides the sum whose norm follows; backward, the gradient through the second norm is what enters the first.
// Three column sums fill the backward's registers, so the two factors live in shared memory, and the gradient of the
// residual stream waits for the second reduction in the slots of the two inputs it was made from.
#include "cuda/column_sums.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/modulation.cuh"

namespace twostep::cuda {
namespace {

template <class T, int W, int V>
__global__ void __launch_bounds__(heavy.max_threads, heavy.resident / heavy.max_threads)
    seam_forward_rows(const GatedResidualNormModulateForward p, const Factor<Gate> gate, const Factor<Scale> scale,
                      const RowPlan plan) {
  const Team<W, V> team(p.width);
  TeamSum sum(team, shared_memory());
  Inputs<T, W, V, 2> inputs(TeamSum::bytes, plan.ahead);
  const bool post_normed = p.post_norm == Norm::rms, layer = p.norm == Norm::layer;
  const bool per_token = gate.per_token() || scale.per_token() || per_token_rows(p.shift);
  const float inverse_width = 1.f / float(p.width), eps = float(p.eps);
  float c[team.held][W], m[team.held][W], s[team.held][W];

  const Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto tensors = [&](int k) -> const ConstRows& { return k == 0 ? p.x : p.z; };
  const auto gating = [&](int v, int column, int i) {
    gate.template product<W, T>(run.b, run.begin + i, column, c[v]);
  };
  const auto modulation = [&](int v, int column, int i) {
    scale.template product<W, T>(run.b, run.begin + i, column, m[v]);
    load_shift<W, T>(p.shift, scale.f32, run.b, run.begin + i, column, s[v]);
  };
  inputs.open(team, run, tensors);
  int64_t row = run.row(p.length), at = row * p.width;
  for (int i = 0; i < run.count; ++i, ++row, at += p.width) {
    if (V > 0 && (i == 0 || per_token)) {
      team.columns([&](int v, int column) {
        gating(v, column, i);
        modulation(v, column, i);
      });
    }
    inputs.next(team, run, i, tensors);
    float x[W], z[W], post_rstd = 1.f;
    if (post_normed) {
      float squares[1] = {0.f};
      team.columns([&](int v, int column) {
        inputs.read(1, v, column, z);
#pragma unroll
        for (int e = 0; e < W; ++e) squares[0] += z[e] * z[e];
      });
      sum(team, squares);
      post_rstd = rsqrtf(squares[0] * inverse_width + eps);
    }
    // The sum as it is stored, rounded, made again in each phase from the rows at hand.
    const auto total = [&](int v, int column) {
      if (V == 0) gating(v, column, i);
      inputs.read(0, v, column, x);
      inputs.read(1, v, column, z);
#pragma unroll
      for (int e = 0; e < W; ++e) x[e] = to_float(from_float<T>(x[e] + c[v][e] * (z[e] * post_rstd)));
    };
    float mean[1] = {0.f}, squares[1] = {0.f};
    if (layer) {
      team.columns([&](int v, int column) {
        total(v, column);
#pragma unroll
        for (int e = 0; e < W; ++e) mean[0] += x[e];
      });
      sum(team, mean);
      mean[0] *= inverse_width;
    }
    team.columns([&](int v, int column) {
      total(v, column);
      store<W>(static_cast<T*>(p.out) + at + column, x);
#pragma unroll
      for (int e = 0; e < W; ++e) squares[0] += (x[e] - mean[0]) * (x[e] - mean[0]);
    });
    sum(team, squares);
    const float rstd = rsqrtf(squares[0] * inverse_width + eps);
    team.columns([&](int v, int column) {
      total(v, column);
      if (V == 0) modulation(v, column, i);
#pragma unroll
      for (int e = 0; e < W; ++e) x[e] = (x[e] - mean[0]) * rstd * m[v][e] + s[v][e];
      store<W>(static_cast<T*>(p.h) + at + column, x);
    });
    if (team.lane == 0) {
      if (post_normed) __stwb(static_cast<float*>(p.post_rstd) + row, post_rstd);
      if (layer) __stwb(static_cast<float*>(p.mean) + row, mean[0]);
      __stwb(static_cast<float*>(p.rstd) + row, rstd);
    }
  }
}

template <class T, int W, int V>
__global__ void __launch_bounds__(heavy.max_threads, heavy.resident / heavy.max_threads)
    seam_backward_rows(const GatedResidualNormModulateBackward p, const Factor<Gate> gate, const Factor<Scale> scale,
                       const RowPlan plan) {
  enum { dout_, dh_, out_, z_, count_ };
  const Team<W, V> team(p.width);
  TeamSum sum(team, shared_memory());
  using Factors = Columns<W, V, 2>;
  Factors factors(TeamSum::bytes);
  Inputs<T, W, V, count_, true> inputs(Factors::end(TeamSum::bytes), plan.ahead);
  const bool post_normed = p.post_norm == Norm::rms, layer = p.norm == Norm::layer;
  const bool scale_token_gradient = V == 0 && p.scale_per_token && scale.present();
  const bool gate_token_gradient = V == 0 && p.gate_per_token && gate.present();
  const bool wants_products = p.dpre_weight != nullptr || (p.dscale != nullptr && !p.scale_per_token);
  const bool wants_branch = p.dpost_weight != nullptr || (p.dgate != nullptr && !p.gate_per_token);
  const float inverse_width = 1.f / float(p.width);
  ColumnSums<W, V> products, gradients, branch;  // A, S, G

  const Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto tensors = [&](int k) -> const ConstRows& {
    return k == dout_ ? p.dout : k == dh_ ? p.dh : k == out_ ? p.out : p.z;
  };
  const auto partial = [&](bool wanted, int which) {
    return wanted ? partial_sums(p.partials, which, run, p.batch, p.width) : nullptr;
  };
  const auto scaling = [&](int v, int column, int i, float (&m)[W]) {
    if constexpr (V > 0) {
      factors.get(0, v, m);
    } else {
      scale.template product<W, T>(run.b, run.begin + i, column, m);
    }
  };
  const auto gating = [&](int v, int column, int i, float (&c)[W]) {
    if constexpr (V > 0) {
      factors.get(1, v, c);
    } else {
      gate.template product<W, T>(run.b, run.begin + i, column, c);
    }
  };
  products.open(team, partial(wants_products, 0));
  gradients.open(team, partial(p.dshift != nullptr, 1));
  branch.open(team, partial(wants_branch, 2));
  int64_t row = run.row(p.length), at = row * p.width;
  RowStatistic means(p.mean, row, run, 0.f), rstds(p.rstd, row, run, 1.f), post_rstds(p.post_rstd, row, run, 1.f);
  inputs.open(team, run, tensors);
  if constexpr (V > 0) {  // modulation is per sample then
    if (run.count > 0) {
      team.columns([&](int v, int column) {
        float f[W];
        scale.template product<W, T>(run.b, run.begin, column, f);
        factors.set(0, v, f);
        gate.template product<W, T>(run.b, run.begin, column, f);
        factors.set(1, v, f);
      });
    }
  }
  for (int i = 0; i < run.count; ++i, ++row, at += p.width) {
    inputs.next(team, run, i, tensors);
    const bool more = i + 1 < run.count;
    const float mean = means.take(row, more), rstd = rstds.take(row, more), post_rstd = post_rstds.take(row, more);

    float along[2] = {0.f, 0.f};  // sums of g * ohat and of g, g = dh * m
    team.columns([&](int v, int column) {
      float dh[W], out[W], m[W];
      scaling(v, column, i, m);
      inputs.read(dh_, v, column, dh);
      inputs.read(out_, v, column, out);
      gradients.add(v, column, partial(p.dshift != nullptr, 1), dh);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        out[e] = dh[e] * ((out[e] - mean) * rstd);
        along[0] += out[e] * m[e];
        along[1] += dh[e] * m[e];
      }
      if (scale_token_gradient) {
        scale.template token_gradient<W, T>(run.b, run.begin + i, at, column, p.dscale, out);
      }
      products.add(v, column, partial(wants_products, 0), out);
    });
    sum(team, along);
    // t, the whole gradient of the residual stream: dout + rstd * (g - centre - ohat * project), with what is the same
    // for the row drawn together.
    const float project = -rstd * rstd * along[0] * inverse_width,
                centre = layer ? -rstd * along[1] * inverse_width : 0.f;
    const auto stream_gradient = [&](int v, int column, float (&t)[W]) {
      float dh[W], m[W];
      scaling(v, column, i, m);
      inputs.read(dh_, v, column, dh);
      inputs.read(out_, v, column, t);
#pragma unroll
      for (int e = 0; e < W; ++e) t[e] = dh[e] * rstd * m[e] + ((t[e] - mean) * project + centre);
      if (p.dout.data == nullptr) return;
      inputs.read(dout_, v, column, dh);
#pragma unroll
      for (int e = 0; e < W; ++e) t[e] += dh[e];
    };
    float branch_along[1] = {0.f};  // sum of t * c * zhat
    team.columns([&](int v, int column) {
      float t[W], z[W], c[W];
      stream_gradient(v, column, t);
      if constexpr (V > 0) inputs.keep(dh_, v, t);
      store<W>(static_cast<T*>(p.dx) + at + column, t);
      gating(v, column, i, c);
      inputs.read(z_, v, column, z);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        z[e] = t[e] * (z[e] * post_rstd);
        branch_along[0] += z[e] * c[e];
      }
      if (gate_token_gradient) {
        gate.template token_gradient<W, T>(run.b, run.begin + i, at, column, p.dgate, z);
      }
      branch.add(v, column, partial(wants_branch, 2), z);
    });
    float branch_project = 0.f;
    if (post_normed) {
      sum(team, branch_along);
      branch_project = -post_rstd * post_rstd * branch_along[0] * inverse_width;
    }
    team.columns([&](int v, int column) {
      float t[W], z[W], c[W];
      if constexpr (V > 0) {
        inputs.kept(dh_, v, t);
      } else {
        stream_gradient(v, column, t);
      }
      gating(v, column, i, c);
      inputs.read(z_, v, column, z);
#pragma unroll
      for (int e = 0; e < W; ++e) z[e] = t[e] * post_rstd * c[e] + z[e] * branch_project;
      store<W>(static_cast<T*>(p.dz) + at + column, z);
    });
  }
  products.close(team, partial(wants_products, 0));
  gradients.close(team, partial(p.dshift != nullptr, 1));
  branch.close(team, partial(wants_branch, 2));
}

}  // namespace

cudaError_t gated_residual_norm_modulate_forward(const GatedResidualNormModulateForward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0) return cudaSuccess;
  if (!parameters_fit(p.dtype, p.param_dtype) || p.width < 1 || p.width > max_width) return cudaErrorNotSupported;
  const int64_t bytes = bytes_of(p.dtype);
  const bool f32 = p.param_dtype == Dtype::f32;
  Alignment aligned(p.param_dtype);
  aligned.rows(p.x, bytes).rows(p.z, bytes).parameter(p.gate).parameter(p.scale).parameter(p.shift);
  aligned.pointer(p.post_weight).pointer(p.pre_weight).pointer(p.out).pointer(p.h);
  const Factor<Gate> gate{p.gate, p.post_weight, f32, p.gate_act == GateAct::tanh};
  const Factor<Scale> scale{p.scale, p.pre_weight, f32, false};
  const RowProblem problem{p.batch, p.length, p.width, bool(aligned), 2, 0, heavy, min_rows_forward, 0};
  return launch_rows(p.dtype, problem, [&](auto element, auto w, auto v, const RowLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    return launch<seam_forward_rows<T, W, V>>(to.grid, stream, p, gate, scale, to.plan);
  });
}

cudaError_t gated_residual_norm_modulate_backward(const GatedResidualNormModulateBackward& p, cudaStream_t stream) {
  if (!parameters_fit(p.dtype, p.param_dtype) || p.width < 1 || p.width > max_width) return cudaErrorNotSupported;
  const int64_t bytes = bytes_of(p.dtype), parameter = p.width * bytes_of(p.param_dtype);
  if (p.batch == 0 || p.length == 0) {
    const int64_t samples = p.batch * parameter;
    return zero({p.dpost_weight, p.dpre_weight, p.gate_per_token ? nullptr : p.dgate,
                 p.scale_per_token ? nullptr : p.dscale, p.dshift},
                {parameter, parameter, samples, samples, samples}, stream);
  }
  const bool f32 = p.param_dtype == Dtype::f32;
  Alignment aligned(p.param_dtype);
  aligned.rows(p.dout, bytes).rows(p.dh, bytes).rows(p.out, bytes).rows(p.z, bytes);
  aligned.parameter(p.gate).parameter(p.scale).pointer(p.post_weight).pointer(p.pre_weight);
  aligned.pointer(p.dx).pointer(p.dz).pointer(p.dgate).pointer(p.dscale).pointer(p.partials.data);
  const Factor<Gate> gate{p.gate, p.post_weight, f32, p.gate_act == GateAct::tanh};
  const Factor<Scale> scale{p.scale, p.pre_weight, f32, false};
  // Gradients per token on top of three column sums and both factors would not fit the registers.
  const bool per_token = p.gate_per_token || p.scale_per_token;
  const int64_t runs = p.partials.data == nullptr ? splits(p.batch, p.length, p.width) : p.partials.splits;
  const RowProblem problem{p.batch, p.length, p.width, bool(aligned), 4, 2, heavy, min_rows_backward, runs, per_token};
  const cudaError_t error = launch_rows(p.dtype, problem, [&](auto element, auto w, auto v, const RowLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    return launch<seam_backward_rows<T, W, V>>(to.grid, stream, p, gate, scale, to.plan);
  });
  if (error != cudaSuccess || p.partials.data == nullptr) return error;
  const auto of_scale = scale_gradients(p.scale, p.scale_per_token, p.pre_weight, p.dscale, p.dpre_weight);
  const auto of_gate = gate_gradients(p.gate, p.gate_act, p.gate_per_token, p.post_weight, p.dgate, p.dpost_weight);
  return sum_columns(p.param_dtype, p.batch, p.width, p.partials,
                     {of_scale, plain_gradients(p.dshift, nullptr), of_gate}, stream);
}

}  // namespace twostep::cuda
