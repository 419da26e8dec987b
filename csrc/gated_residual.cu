// gated_residual on CUDA; the maths and the bytes are in gated_residual.h.
//
// A team per row, runs of rows per team (cuda/rows.cuh). act(gate) * weight of a sample is held for the whole run:
// in registers forward, in shared memory backward, where the registers hold the column sums.
#include "cuda/column_sums.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/modulation.cuh"

namespace twostep::cuda {
namespace {

template <class T, int W, int V>
__global__ void __launch_bounds__(light.max_threads, light.resident / light.max_threads)
    gated_residual_forward_rows(const GatedResidualForward p, const Factor<Gate> gate, const RowPlan plan) {
  const Team<W, V> team(p.width);
  TeamSum sum(team, shared_memory());
  Inputs<T, W, V, 2> inputs(TeamSum::bytes, plan.ahead);
  const bool normed = p.norm == Norm::rms, per_token = gate.per_token();
  const float inverse_width = 1.f / float(p.width), eps = float(p.eps);
  float c[team.held][W];

  const Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto tensors = [&](int k) -> const ConstRows& { return k == 0 ? p.x : p.z; };
  inputs.open(team, run, tensors);
  int64_t row = run.row(p.length), at = row * p.width;
  for (int i = 0; i < run.count; ++i, ++row, at += p.width) {
    if (V > 0 && (i == 0 || per_token)) {
      team.columns([&](int v, int column) { gate.template product<W, T>(run.b, run.begin + i, column, c[v]); });
    }
    inputs.next(team, run, i, tensors);
    float x[W], z[W], rstd = 1.f;
    if (normed) {
      float squares[1] = {0.f};
      team.columns([&](int v, int column) {
        inputs.read(1, v, column, z);
#pragma unroll
        for (int e = 0; e < W; ++e) squares[0] += z[e] * z[e];
      });
      sum(team, squares);
      rstd = rsqrtf(squares[0] * inverse_width + eps);
      if (team.lane == 0) __stwb(static_cast<float*>(p.rstd) + row, rstd);
    }
    team.columns([&](int v, int column) {
      if (V == 0) gate.template product<W, T>(run.b, run.begin + i, column, c[v]);
      inputs.read(0, v, column, x);
      inputs.read(1, v, column, z);
#pragma unroll
      for (int e = 0; e < W; ++e) x[e] += c[v][e] * (z[e] * rstd);
      store<W>(static_cast<T*>(p.out) + at + column, x);
    });
  }
}

// PerToken: modulation per token is possible; without it the loop over rows is short enough for the registers.
template <class T, int W, int V, bool PerToken>
__global__ void __launch_bounds__(heavy.max_threads, heavy.resident / heavy.max_threads)
    gated_residual_backward_rows(const GatedResidualBackward p, const Factor<Gate> gate, const RowPlan plan) {
  const Team<W, V> team(p.width);
  TeamSum sum(team, shared_memory());
  using Factors = Columns<W, V, 1>;
  Factors factors(TeamSum::bytes);
  Inputs<T, W, V, 2> inputs(Factors::end(TeamSum::bytes), plan.ahead);
  const bool normed = p.norm == Norm::rms, per_token = PerToken && gate.per_token();
  const bool token_gradient = PerToken && p.gate_per_token && gate.present();
  const bool wants_products = p.dweight != nullptr || (p.dgate != nullptr && !p.gate_per_token);
  const float inverse_width = 1.f / float(p.width);
  ColumnSums<W, V> products;

  const Run run(plan, p.length);
  if (run.b >= p.batch) return;
  const auto tensors = [&](int k) -> const ConstRows& { return k == 0 ? p.dout : p.z; };
  const auto partial = [&] { return wants_products ? partial_sums(p.partials, 0, run, p.batch, p.width) : nullptr; };
  const auto factor = [&](int v, int column, int i, float (&c)[W]) {
    if constexpr (V > 0) {
      factors.get(0, v, c);
    } else {
      gate.template product<W, T>(run.b, run.begin + i, column, c);
    }
  };
  const auto set_factors = [&](int i) {
    if constexpr (V > 0) {
      team.columns([&](int v, int column) {
        float c[W];
        gate.template product<W, T>(run.b, run.begin + i, column, c);
        factors.set(0, v, c);
      });
    }
  };
  products.open(team, partial());
  int64_t row = run.row(p.length), at = row * p.width;
  RowStatistic rstds(p.rstd, row, run, 1.f);
  inputs.open(team, run, tensors);
  if (run.count > 0) set_factors(0);
  for (int i = 0; i < run.count; ++i, ++row, at += p.width) {
    float dout[W], z[W], c[W], along[1] = {0.f};  // sum of g * zhat
    if (PerToken && i > 0 && per_token) set_factors(i);
    inputs.next(team, run, i, tensors);
    const float rstd = rstds.take(row, i + 1 < run.count);
    team.columns([&](int v, int column) {
      factor(v, column, i, c);
      inputs.read(0, v, column, dout);
      inputs.read(1, v, column, z);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        z[e] = dout[e] * (z[e] * rstd);
        along[0] += z[e] * c[e];
      }
      if (token_gradient) {
        gate.template token_gradient<W, T>(run.b, run.begin + i, at, column, p.dgate, z);
      }
      products.add(v, column, partial(), z);
    });
    float project = 0.f;  // rstd * (g - zhat * mean(g * zhat)), with what is the same for the row drawn together
    if (normed) {
      sum(team, along);
      project = -rstd * rstd * along[0] * inverse_width;
    }
    team.columns([&](int v, int column) {
      factor(v, column, i, c);
      inputs.read(0, v, column, dout);
      inputs.read(1, v, column, z);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const float g = dout[e] * rstd * c[e];
        z[e] = normed ? g + z[e] * project : g;  // without a norm dz does not look at z, which may be infinite
      }
      store<W>(static_cast<T*>(p.dz) + at + column, z);
    });
  }
  products.close(team, partial());
}

}  // namespace

cudaError_t gated_residual_forward(const GatedResidualForward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0) return cudaSuccess;
  if (!parameters_fit(p.dtype, p.param_dtype) || p.width < 1 || p.width > max_width) return cudaErrorNotSupported;
  const int64_t bytes = bytes_of(p.dtype);
  Alignment aligned(p.param_dtype);
  aligned.rows(p.x, bytes).rows(p.z, bytes).parameter(p.gate).pointer(p.weight).pointer(p.out);
  const Factor<Gate> gate{p.gate, p.weight, p.param_dtype == Dtype::f32, p.gate_act == GateAct::tanh};
  const RowProblem problem{p.batch, p.length, p.width, bool(aligned), 2, 0, light, min_rows_forward, 0};
  return launch_rows(p.dtype, problem, [&](auto element, auto w, auto v, const RowLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    return launch<gated_residual_forward_rows<T, W, V>>(to.grid, stream, p, gate, to.plan);
  });
}

cudaError_t gated_residual_backward(const GatedResidualBackward& p, cudaStream_t stream) {
  if (!parameters_fit(p.dtype, p.param_dtype) || p.width < 1 || p.width > max_width) return cudaErrorNotSupported;
  const int64_t bytes = bytes_of(p.dtype), parameter = p.width * bytes_of(p.param_dtype);
  if (p.batch == 0 || p.length == 0) {
    return zero({p.dweight, p.gate_per_token ? nullptr : p.dgate}, {parameter, p.batch * parameter}, stream);
  }
  Alignment aligned(p.param_dtype);
  aligned.rows(p.dout, bytes).rows(p.z, bytes).parameter(p.gate).pointer(p.weight);
  aligned.pointer(p.dz).pointer(p.dgate).pointer(p.partials.data);
  const Factor<Gate> gate{p.gate, p.weight, p.param_dtype == Dtype::f32, p.gate_act == GateAct::tanh};
  const int64_t runs = p.partials.data == nullptr ? splits(p.batch, p.length, p.width) : p.partials.splits;
  const RowProblem problem{p.batch, p.length, p.width, bool(aligned), 2, 1, heavy, min_rows_backward, runs};
  const cudaError_t error = launch_rows(p.dtype, problem, [&](auto element, auto w, auto v, const RowLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    if constexpr (V > 0) {
      if (!p.gate_per_token)
        return launch<gated_residual_backward_rows<T, W, V, false>>(to.grid, stream, p, gate, to.plan);
    }
    return launch<gated_residual_backward_rows<T, W, V, true>>(to.grid, stream, p, gate, to.plan);
  });
  if (error != cudaSuccess || p.partials.data == nullptr) return error;
  const auto of_gate = gate_gradients(p.gate, p.gate_act, p.gate_per_token, p.weight, p.dgate, p.dweight);
  return sum_columns(p.param_dtype, p.batch, p.width, p.partials, {of_gate}, stream);
}

}  // namespace twostep::cuda
