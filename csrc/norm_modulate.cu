// norm_modulate on CUDA; the maths and the bytes are in norm_modulate.h.
//
// A team per row, runs of rows per team (cuda/rows.cuh): weight * (1 + scale) and shift of a sample stay in registers
// for the whole run, so a row costs its own bytes only. RMS needs one reduction a row, Layer two: the variance is taken
// around the mean, since sums of squares cancel.
#include "cuda/column_sums.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/modulation.cuh"

namespace twostep::cuda {
namespace {

template <class T, int W, int V>
__global__ void __launch_bounds__(light.max_threads, light.resident / light.max_threads)
    norm_modulate_forward_rows(const NormModulateForward p, const Factor<Scale> scale, const RowPlan plan) {
  const Team<W, V> team(p.width);
  TeamSum sum(team, shared_memory());
  Inputs<T, W, V, 1> inputs(TeamSum::bytes, plan.ahead);
  const bool layer = p.norm == Norm::layer, per_token = scale.per_token() || per_token_rows(p.shift);
  const float inverse_width = 1.f / float(p.width), eps = float(p.eps);
  float m[team.held][W], s[team.held][W];

  const Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto tensors = [&](int) -> const ConstRows& { return p.x; };
  const auto modulation = [&](int v, int column, int64_t l) {
    scale.template product<W, T>(run.b, l, column, m[v]);
    load_shift<W, T>(p.shift, scale.f32, run.b, l, column, s[v]);
  };
  inputs.open(team, run, tensors);
  int64_t row = run.row(p.length), at = row * p.width;
  for (int i = 0; i < run.count; ++i, ++row, at += p.width) {
    if (V > 0 && (i == 0 || per_token)) {
      team.columns([&](int v, int column) { modulation(v, column, run.begin + i); });
    }
    inputs.next(team, run, i, tensors);
    float x[W], mean[1] = {0.f}, squares[1] = {0.f};
    if (layer) {
      team.columns([&](int v, int column) {
        inputs.read(0, v, column, x);
#pragma unroll
        for (int e = 0; e < W; ++e) mean[0] += x[e];
      });
      sum(team, mean);
      mean[0] *= inverse_width;
    }
    team.columns([&](int v, int column) {
      inputs.read(0, v, column, x);
#pragma unroll
      for (int e = 0; e < W; ++e) squares[0] += (x[e] - mean[0]) * (x[e] - mean[0]);
    });
    sum(team, squares);
    const float rstd = rsqrtf(squares[0] * inverse_width + eps);
    team.columns([&](int v, int column) {
      if (V == 0) modulation(v, column, run.begin + i);
      inputs.read(0, v, column, x);
#pragma unroll
      for (int e = 0; e < W; ++e) x[e] = (x[e] - mean[0]) * rstd * m[v][e] + s[v][e];
      store<W>(static_cast<T*>(p.y) + at + column, x);
    });
    if (team.lane == 0) {
      if (layer) __stwb(static_cast<float*>(p.mean) + row, mean[0]);
      __stwb(static_cast<float*>(p.rstd) + row, rstd);
    }
  }
}

// PerToken: modulation per token is possible; without it the loop over rows is short enough for the registers.
template <class T, int W, int V, bool PerToken>
__global__ void __launch_bounds__(heavy.max_threads, heavy.resident / heavy.max_threads)
    norm_modulate_backward_rows(const NormModulateBackward p, const Factor<Scale> scale, const RowPlan plan) {
  const Team<W, V> team(p.width);
  TeamSum sum(team, shared_memory());
  using Factors = Columns<W, V, 1>;
  Factors factors(TeamSum::bytes);
  Inputs<T, W, V, 2> inputs(Factors::end(TeamSum::bytes), plan.ahead);
  const bool layer = p.norm == Norm::layer, per_token = PerToken && scale.per_token();
  const bool token_gradient = PerToken && p.scale_per_token && scale.present();
  const bool wants_products = p.dweight != nullptr || (p.dscale != nullptr && !p.scale_per_token);
  const float inverse_width = 1.f / float(p.width);
  ColumnSums<W, V> products, gradients;

  const Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto tensors = [&](int k) -> const ConstRows& { return k == 0 ? p.dy : p.x; };
  const auto partial = [&](bool wanted, int which) {
    return wanted ? partial_sums(p.partials, which, run, p.batch, p.width) : nullptr;
  };
  const auto factor = [&](int v, int column, int i, float (&m)[W]) {
    if constexpr (V > 0) {
      factors.get(0, v, m);
    } else {
      scale.template product<W, T>(run.b, run.begin + i, column, m);
    }
  };
  const auto set_factors = [&](int i) {
    if constexpr (V > 0) {
      team.columns([&](int v, int column) {
        float m[W];
        scale.template product<W, T>(run.b, run.begin + i, column, m);
        factors.set(0, v, m);
      });
    }
  };
  products.open(team, partial(wants_products, 0));
  gradients.open(team, partial(p.dshift != nullptr, 1));
  int64_t row = run.row(p.length), at = row * p.width;
  RowStatistic means(p.mean, row, run, 0.f), rstds(p.rstd, row, run, 1.f);
  inputs.open(team, run, tensors);
  if (run.count > 0) set_factors(0);
  for (int i = 0; i < run.count; ++i, ++row, at += p.width) {
    float dy[W], x[W], m[W], along[2] = {0.f, 0.f};  // sums of g * xhat and of g
    if (PerToken && i > 0 && per_token) set_factors(i);
    inputs.next(team, run, i, tensors);
    const bool more = i + 1 < run.count;
    const float mean = means.take(row, more), rstd = rstds.take(row, more);
    team.columns([&](int v, int column) {
      factor(v, column, i, m);
      inputs.read(0, v, column, dy);
      inputs.read(1, v, column, x);
      gradients.add(v, column, partial(p.dshift != nullptr, 1), dy);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        x[e] = dy[e] * ((x[e] - mean) * rstd);
        along[0] += x[e] * m[e];
        along[1] += dy[e] * m[e];
      }
      if (token_gradient) scale.template token_gradient<W, T>(run.b, run.begin + i, at, column, p.dscale, x);
      products.add(v, column, partial(wants_products, 0), x);
    });
    sum(team, along);
    // rstd * (g - centre - xhat * project), with what is the same for the row drawn together.
    const float project = -rstd * rstd * along[0] * inverse_width,
                centre = layer ? -rstd * along[1] * inverse_width : 0.f;
    team.columns([&](int v, int column) {
      factor(v, column, i, m);
      inputs.read(0, v, column, dy);
      inputs.read(1, v, column, x);
#pragma unroll
      for (int e = 0; e < W; ++e) x[e] = dy[e] * rstd * m[e] + ((x[e] - mean) * project + centre);
      store<W>(static_cast<T*>(p.dx) + at + column, x);
    });
  }
  products.close(team, partial(wants_products, 0));
  gradients.close(team, partial(p.dshift != nullptr, 1));
}

}  // namespace

cudaError_t norm_modulate_forward(const NormModulateForward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0) return cudaSuccess;
  if (!parameters_fit(p.dtype, p.param_dtype) || p.width < 1 || p.width > max_width) return cudaErrorNotSupported;
  const int64_t bytes = bytes_of(p.dtype);
  Alignment aligned(p.param_dtype);
  aligned.rows(p.x, bytes).parameter(p.scale).parameter(p.shift).pointer(p.weight).pointer(p.y);
  const Factor<Scale> scale{p.scale, p.weight, p.param_dtype == Dtype::f32, false};
  const RowProblem problem{p.batch, p.length, p.width, bool(aligned), 1, 0, light, min_rows_forward, 0};
  return launch_rows(p.dtype, problem, [&](auto element, auto w, auto v, const RowLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    return launch<norm_modulate_forward_rows<T, W, V>>(to.grid, stream, p, scale, to.plan);
  });
}

cudaError_t norm_modulate_backward(const NormModulateBackward& p, cudaStream_t stream) {
  if (!parameters_fit(p.dtype, p.param_dtype) || p.width < 1 || p.width > max_width) return cudaErrorNotSupported;
  const int64_t bytes = bytes_of(p.dtype), parameter = p.width * bytes_of(p.param_dtype);
  void* const sample_dscale = p.scale_per_token ? nullptr : p.dscale;
  if (p.batch == 0 || p.length == 0) {
    return zero({p.dweight, sample_dscale, p.dshift}, {parameter, p.batch * parameter, p.batch * parameter}, stream);
  }
  Alignment aligned(p.param_dtype);
  aligned.rows(p.dy, bytes).rows(p.x, bytes).parameter(p.scale).pointer(p.weight);
  aligned.pointer(p.dx).pointer(p.dscale).pointer(p.partials.data);
  const Factor<Scale> scale{p.scale, p.weight, p.param_dtype == Dtype::f32, false};
  const int64_t runs = p.partials.data == nullptr ? splits(p.batch, p.length, p.width) : p.partials.splits;
  const RowProblem problem{p.batch, p.length, p.width, bool(aligned), 2, 1, heavy, min_rows_backward, runs};
  const cudaError_t error = launch_rows(p.dtype, problem, [&](auto element, auto w, auto v, const RowLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    if constexpr (V > 0) {
      if (!p.scale_per_token)
        return launch<norm_modulate_backward_rows<T, W, V, false>>(to.grid, stream, p, scale, to.plan);
    }
    return launch<norm_modulate_backward_rows<T, W, V, true>>(to.grid, stream, p, scale, to.plan);
  });
  if (error != cudaSuccess || p.partials.data == nullptr) return error;
  const auto of_scale = scale_gradients(p.scale, p.scale_per_token, p.weight, p.dscale, p.dweight);
  return sum_columns(p.param_dtype, p.batch, p.width, p.partials, {of_scale, plain_gradients(p.dshift, nullptr)},
                     stream);
}

}  // namespace twostep::cuda
