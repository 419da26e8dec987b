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
  Inputs<T, W, V, 2> inputs(shared_memory() + TeamSum::bytes, plan.ahead);
  const bool post_normed = p.post_norm == Norm::rms, layer = p.norm == Norm::layer;
  const bool per_token = gate.per_token() || scale.per_token() || per_token_rows(p.shift);
  const float inverse_width = 1.f / float(p.width), eps = float(p.eps);
  float c[team.held][W], m[team.held][W], s[team.held][W];

  const Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto rows = [&](int k, int i) { return row_of<T>(k == 0 ? p.x : p.z, run, i); };
  const auto gating = [&](int v, int column, int i) {
    gate.template product<W, T>(run.b, run.begin + i, column, c[v]);
  };
  const auto modulation = [&](int v, int column, int i) {
    scale.template product<W, T>(run.b, run.begin + i, column, m[v]);
    load_shift<W, T>(p.shift, scale.f32, run.b, run.begin + i, column, s[v]);
  };
  inputs.open(team, run, rows);
  for (int i = 0; i < run.count; ++i) {
    if (V > 0 && (i == 0 || per_token)) {
      team.columns([&](int v, int column) {
        gating(v, column, i);
        modulation(v, column, i);
      });
    }
    inputs.next(team, run, i, rows);
    const int64_t row = run.row(p.length, i);
    float x[W], z[W], post_rstd = 1.f;
    if (post_normed) {
      float squares[1] = {0.f};
      team.columns([&](int v, int column) {
        inputs.read(1, v, column, i, rows, z);
#pragma unroll
        for (int e = 0; e < W; ++e) squares[0] += z[e] * z[e];
      });
      sum(team, squares);
      post_rstd = rsqrtf(squares[0] * inverse_width + eps);
    }
    // The unrounded sum, made again in each phase from the rows at hand.
    const auto total = [&](int v, int column) {
      if (V == 0) gating(v, column, i);
      inputs.read(0, v, column, i, rows, x);
      inputs.read(1, v, column, i, rows, z);
#pragma unroll
      for (int e = 0; e < W; ++e) x[e] += c[v][e] * (z[e] * post_rstd);
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
      store<W>(static_cast<T*>(p.out) + row * p.width + column, x);
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
      store<W>(static_cast<T*>(p.h) + row * p.width + column, x);
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
  enum { dout_, dh_, out_, z_, tensors };
  const Team<W, V> team(p.width);
  TeamSum sum(team, shared_memory());
  Columns<W, V, 2> factors(shared_memory() + TeamSum::bytes);
  Inputs<T, W, V, tensors> inputs(after<Columns<W, V, 2>>(shared_memory() + TeamSum::bytes), plan.ahead);
  const bool post_normed = p.post_norm == Norm::rms, layer = p.norm == Norm::layer;
  const bool per_token = V == 0 && (gate.per_token() || scale.per_token());
  const bool scale_token_gradient = V == 0 && p.scale_per_token && scale.present();
  const bool gate_token_gradient = V == 0 && p.gate_per_token && gate.present();
  const bool wants_products = p.dpre_weight != nullptr || (p.dscale != nullptr && !p.scale_per_token);
  const bool wants_branch = p.dpost_weight != nullptr || (p.dgate != nullptr && !p.gate_per_token);
  const float inverse_width = 1.f / float(p.width);
  ColumnSums<W, V> products, gradients, branch;  // A, S, G

  Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto rows = [&](int k, int i) -> const T* {
    if (k == dout_ && p.dout.data == nullptr) return nullptr;
    return row_of<T>(k == dout_ ? p.dout : k == dh_ ? p.dh : k == out_ ? p.out : p.z, run, i);
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
  const int64_t first = run.row(p.length, 0);
  RowStatistic means(p.mean, first, run, 0.f), rstds(p.rstd, first, run, 1.f), post_rstds(p.post_rstd, first, run, 1.f);
  inputs.open(team, run, rows);
  for (int i = 0; i < run.count; ++i) {
    run.forget();
    if constexpr (V > 0) {
      if (i == 0 || per_token) {
        team.columns([&](int v, int column) {
          float f[W];
          scale.template product<W, T>(run.b, run.begin + i, column, f);
          factors.set(0, v, f);
          gate.template product<W, T>(run.b, run.begin + i, column, f);
          factors.set(1, v, f);
        });
      }
    }
    inputs.next(team, run, i, rows);
    const int64_t row = run.row(p.length, i);
    const bool more = i + 1 < run.count;
    const float mean = means.take(row, more), rstd = rstds.take(row, more), post_rstd = post_rstds.take(row, more);

    float along[2] = {0.f, 0.f};  // sums of g * ohat and of g, g = dh * m
    team.columns([&](int v, int column) {
      float dh[W], out[W], m[W];
      scaling(v, column, i, m);
      inputs.read(dh_, v, column, i, rows, dh);
      inputs.read(out_, v, column, i, rows, out);
      gradients.add(v, column, partial(p.dshift != nullptr, 1), dh);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        out[e] = dh[e] * ((out[e] - mean) * rstd);
        along[0] += out[e] * m[e];
        along[1] += dh[e] * m[e];
      }
      if (scale_token_gradient) {
        scale.template token_gradient<W, T>(run.b, run.begin + i, row, column, team.width, p.dscale, out);
      }
      products.add(v, column, partial(wants_products, 0), out);
    });
    sum(team, along);
    const float project = along[0] * inverse_width, centre = layer ? along[1] * inverse_width : 0.f;

    // t, the whole gradient of the residual stream.
    const auto stream_gradient = [&](int v, int column, float (&t)[W]) {
      float dh[W], m[W];
      scaling(v, column, i, m);
      inputs.read(dh_, v, column, i, rows, dh);
      inputs.read(out_, v, column, i, rows, t);
#pragma unroll
      for (int e = 0; e < W; ++e) t[e] = rstd * (dh[e] * m[e] - centre - (t[e] - mean) * rstd * project);
      if (p.dout.data == nullptr) return;
      inputs.read(dout_, v, column, i, rows, dh);
#pragma unroll
      for (int e = 0; e < W; ++e) t[e] += dh[e];
    };
    float branch_along[1] = {0.f};  // sum of t * c * zhat
    team.columns([&](int v, int column) {
      float t[W], z[W], c[W];
      stream_gradient(v, column, t);
      if constexpr (V > 0) inputs.keep(dh_, v, t);
      store<W>(static_cast<T*>(p.dx) + row * p.width + column, t);
      gating(v, column, i, c);
      inputs.read(z_, v, column, i, rows, z);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        z[e] = t[e] * (z[e] * post_rstd);
        branch_along[0] += z[e] * c[e];
      }
      if (gate_token_gradient) {
        gate.template token_gradient<W, T>(run.b, run.begin + i, row, column, team.width, p.dgate, z);
      }
      branch.add(v, column, partial(wants_branch, 2), z);
    });
    float branch_project = 0.f;
    if (post_normed) {
      sum(team, branch_along);
      branch_project = branch_along[0] * inverse_width;
    }
    team.columns([&](int v, int column) {
      float t[W], z[W], c[W];
      if constexpr (V > 0) {
        inputs.kept(dh_, v, t);
      } else {
        stream_gradient(v, column, t);
      }
      gating(v, column, i, c);
      inputs.read(z_, v, column, i, rows, z);
#pragma unroll
      for (int e = 0; e < W; ++e) z[e] = post_rstd * (t[e] * c[e] - z[e] * post_rstd * branch_project);
      store<W>(static_cast<T*>(p.dz) + row * p.width + column, z);
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
