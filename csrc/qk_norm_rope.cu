// qk_norm_rope on CUDA; the maths and the bytes are in qk_norm_rope.h, how heads are dealt in cuda/heads.cuh.
//
// q and k go to different blocks (even and odd): each needs one weight and one column sum, and the table that both
// read is small beside them and in the L2 cache the second time. The backward gets the sum of squares and the
// projection from one reduction, since both are sums of what is at hand: mean(g * xhat) = rstd * mean(g * x).
#include "cuda/column_sums.h"
#include "cuda/heads.cuh"
#include "cuda/kernels.h"

namespace twostep::cuda {
namespace {

constexpr int in_flight = 4;            // vectors a thread loads at once: 64 bytes, 64 KB a multiprocessor
constexpr int in_flight_backward = 2;   // two tensors each: the same bytes
constexpr int resident_backward = 768;  // 80 registers a thread

// q or k. A block indexes its side of a __grid_constant__ parameter, which stays in constant memory: chosen by value,
// six strides would fill registers.
struct Side {
  ConstHeads gradient, x;  // gradient in the backward only
  const void* weight;
  void* out;
  bool wants_sum;
};

struct Sides {
  Side of[2];
  bool f32;  // the weights' dtype
  float eps;
  int64_t batch, length, width;
  ConstRows freqs;
  float* partials;
};

template <int W, class T>
__device__ inline void weights_of(const void* weight, bool f32, int column, float (&out)[W]) {
  if (weight != nullptr) {
    load_parameter<W, T>(weight, f32, column, out);
  } else {
#pragma unroll
    for (int e = 0; e < W; ++e) out[e] = 1.f;
  }
}

template <class T, int W, int V>
__global__ void __launch_bounds__(heads_block, heads_resident / heads_block)
    qk_norm_rope_forward_heads(const __grid_constant__ Sides p, const HeadPlan plan) {
  const Team<W, V> team(p.width);
  const Side& side = p.of[blockIdx.x & 1];
  HeadRun run(plan, blockIdx.x >> 1, p.length);
  const float inverse_width = 1.f / float(p.width);
  constexpr int flight = heads_in_flight<in_flight, V>;
  const int heads = int(side.x.heads);
  float weights[team.held][W], turns[team.held][W];
  if (V > 0) team.columns([&](int v, int column) { weights_of<W, T>(side.weight, p.f32, column, weights[v]); });

  for (int i = run.token; i < run.count; i += plan.token_slots) {
    run.forget();
    const int64_t l = run.begin + i;
    const float* freqs = frequencies_of(p.freqs, run.b, l);
    const T* from = heads_of<T>(side.x, run.b, l);
    T* const to = static_cast<T*>(side.out) + (run.b * p.length + l) * (heads * p.width);
    if (V > 0) team.columns([&](int v, int column) { load<W>(freqs + column, turns[v]); });
    for (int first = run.head; first < heads; first += flight * plan.head_slots) {
      Head<T, W, V> held[flight];
      float squares[flight] = {};
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        const int h = first + n * plan.head_slots;
        if (h < heads) held[n].fetch(team, from + h * side.x.head_stride);
      }
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        if (first + n * plan.head_slots >= heads) continue;
        team.columns([&](int v, int column) {
          float x_[W];
          held[n].read(v, column, x_);
#pragma unroll
          for (int e = 0; e < W; ++e) squares[n] += x_[e] * x_[e];
        });
      }
      sum_lanes(team, squares);
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        const int h = first + n * plan.head_slots;
        if (h >= heads) continue;
        const float rstd = rsqrtf(squares[n] * inverse_width + p.eps);
        T* y = to + h * team.width;
        team.columns([&](int v, int column) {
          float y_[W];
          if (V == 0) weights_of<W, T>(side.weight, p.f32, column, weights[v]);
          if (V == 0) load<W>(freqs + column, turns[v]);
          held[n].read(v, column, y_);
#pragma unroll
          for (int e = 0; e < W; ++e) y_[e] *= rstd * weights[v][e];
          turn(turns[v], 1.f, y_);
          store<W>(y + column, y_);
        });
      }
    }
  }
}

// A block's sums of dn * xhat: each team adds to its own line of shared memory, then lines are added in order.
template <int W>
__device__ inline void add_shared(float* sums, const float (&x)[W]) {
#pragma unroll
  for (int e = 0; e < W; ++e) shared_store(sums + e, shared_load(sums + e) + x[e]);
}

template <class T, int W, int V>
__global__ void __launch_bounds__(heads_block, resident_backward / heads_block)
    qk_norm_rope_backward_heads(const __grid_constant__ Sides p, const HeadPlan plan) {
  const Team<W, V> team(p.width);
  const Side& side = p.of[blockIdx.x & 1];
  HeadRun run(plan, blockIdx.x >> 1, p.length);
  const float inverse_width = 1.f / float(p.width);
  float* const lines = reinterpret_cast<float*>(shared_memory());
  float* const line = lines + int(threadIdx.y) * team.width;
  constexpr int flight = heads_in_flight<in_flight_backward, V>;
  const int heads = int(side.x.heads);
  float weights[team.held][W], turns[team.held][W], sums[team.held][W] = {};
  if (V > 0) team.columns([&](int v, int column) { weights_of<W, T>(side.weight, p.f32, column, weights[v]); });
  if (V == 0) {
    team.columns([&](int, int column) {
#pragma unroll
      for (int e = 0; e < W; ++e) shared_store(line + column + e, 0.f);
    });
  }

  for (int i = run.token; i < run.count; i += plan.token_slots) {
    run.forget();
    const int64_t l = run.begin + i;
    const float* freqs = frequencies_of(p.freqs, run.b, l);
    const T *from_gradient = heads_of<T>(side.gradient, run.b, l), *from = heads_of<T>(side.x, run.b, l);
    T* const to = static_cast<T*>(side.out) + (run.b * p.length + l) * (heads * p.width);
    if (V > 0) team.columns([&](int v, int column) { load<W>(freqs + column, turns[v]); });
    for (int first = run.head; first < heads; first += flight * plan.head_slots) {
      Head<T, W, V> dys[flight], xs[flight];
      float along[2 * flight] = {};  // for each head the sums of x * x and of g * x
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        const int h = first + n * plan.head_slots;
        if (h >= heads) continue;
        dys[n].fetch(team, from_gradient + h * side.gradient.head_stride);
        xs[n].fetch(team, from + h * side.x.head_stride);
      }
      // dn, the incoming gradient turned back.
      const auto turned_back = [&](int n, int v, int column, float (&dn)[W], float (&x_)[W]) {
        if (V == 0) weights_of<W, T>(side.weight, p.f32, column, weights[v]);
        if (V == 0) load<W>(freqs + column, turns[v]);
        dys[n].read(v, column, dn);
        turn(turns[v], -1.f, dn);
        xs[n].read(v, column, x_);
      };
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        if (first + n * plan.head_slots >= heads) continue;
        team.columns([&](int v, int column) {
          float dn[W], x_[W];
          turned_back(n, v, column, dn, x_);
#pragma unroll
          for (int e = 0; e < W; ++e) {
            along[2 * n] += x_[e] * x_[e];
            along[2 * n + 1] += dn[e] * weights[v][e] * x_[e];
          }
        });
      }
      sum_lanes(team, along);
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        const int h = first + n * plan.head_slots;
        if (h >= heads) continue;
        const float rstd = rsqrtf(along[2 * n] * inverse_width + p.eps);
        const float project = along[2 * n + 1] * rstd * inverse_width;
        T* dx = to + h * team.width;
        team.columns([&](int v, int column) {
          float dn[W], x_[W];
          turned_back(n, v, column, dn, x_);
#pragma unroll
          for (int e = 0; e < W; ++e) {
            const float xhat = x_[e] * rstd;
            x_[e] = rstd * (dn[e] * weights[v][e] - xhat * project);
            dn[e] *= xhat;
            if (V > 0) sums[v][e] += dn[e];
          }
          if (V == 0) add_shared(line + column, dn);
          store<W>(dx + column, x_);
        });
      }
    }
  }
  if (!side.wants_sum) return;  // the same for the whole block
  if (V > 0) {
    team.columns([&](int v, int column) {
#pragma unroll
      for (int e = 0; e < W; ++e) shared_store(line + column + e, sums[v][e]);
    });
  }
  __syncthreads();
  // Runs are numbered through the batch, as blocks are.
  const int64_t row = (blockIdx.x & 1) * p.batch * plan.runs + (blockIdx.x >> 1);
  float* const partial = p.partials + row * p.width;
  for (int column = int(threadIdx.y * blockDim.x + threadIdx.x); column < team.width;
       column += int(blockDim.x * blockDim.y)) {
    float total = 0.f;
    for (int slot = 0; slot < int(blockDim.y); ++slot) total += shared_load(lines + slot * team.width + column);
    __stwb(partial + column, total);
  }
}

template <class Problem>
bool fits(const Problem& p) {
  return parameters_fit(p.dtype, p.param_dtype) && p.width >= 2 && p.width % 2 == 0 && p.width <= max_head_width;
}

}  // namespace

cudaError_t qk_norm_rope_forward(const QkNormRopeForward& p, cudaStream_t stream) {
  if (p.dtype == Dtype::f64 || !fits(p)) return cudaErrorNotSupported;
  const int64_t heads = std::max(p.q.heads, p.k.heads), bytes = bytes_of(p.dtype);
  if (p.batch == 0 || p.length == 0 || heads == 0) return cudaSuccess;
  Alignment aligned(Dtype::f32);
  aligned.heads(p.q, bytes).heads(p.k, bytes).parameter(p.freqs);
  aligned.pointer(p.q_weight).pointer(p.k_weight).pointer(p.q_out).pointer(p.k_out);
  const Side q{{}, p.q, p.q_weight, p.q_out, false}, k{{}, p.k, p.k_weight, p.k_out, false};
  const bool f32 = p.param_dtype == Dtype::f32;
  const Sides sides{{q, k}, f32, float(p.eps), p.batch, p.length, p.width, p.freqs, nullptr};
  const HeadProblem problem{p.batch, p.length, p.width, heads, 2, bool(aligned), in_flight};
  return launch_heads(p.dtype, problem, [&](auto element, auto w, auto v, const HeadLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    return launch<qk_norm_rope_forward_heads<T, W, V>>(to.grid, stream, sides, to.plan);
  });
}

cudaError_t qk_norm_rope_backward(const QkNormRopeBackward& p, cudaStream_t stream) {
  if (p.dtype == Dtype::f64 || !fits(p)) return cudaErrorNotSupported;
  const int64_t heads = std::max(p.q.heads, p.k.heads), bytes = bytes_of(p.dtype);
  if (p.batch == 0 || p.length == 0 || heads == 0) {
    const int64_t parameter = p.width * bytes_of(p.param_dtype);
    return zero({p.dq_weight, p.dk_weight}, {parameter, parameter}, stream);
  }
  Alignment aligned(Dtype::f32);
  aligned.heads(p.dq_out, bytes).heads(p.dk_out, bytes).heads(p.q, bytes).heads(p.k, bytes).parameter(p.freqs);
  aligned.pointer(p.q_weight).pointer(p.k_weight).pointer(p.dq).pointer(p.dk);
  const Side q{p.dq_out, p.q, p.q_weight, p.dq, p.dq_weight != nullptr};
  const Side k{p.dk_out, p.k, p.k_weight, p.dk, p.dk_weight != nullptr};
  const bool f32 = p.param_dtype == Dtype::f32;
  float* const sums = static_cast<float*>(p.partials.data);
  const Sides sides{{q, k}, f32, float(p.eps), p.batch, p.length, p.width, p.freqs, sums};
  HeadProblem problem{p.batch, p.length, p.width, heads, 2, bool(aligned), in_flight_backward};
  problem.resident = resident_backward;
  problem.lines = true;
  if (sums != nullptr) problem.most_runs = p.partials.splits;
  Partials partials = p.partials;
  const cudaError_t error = launch_heads(p.dtype, problem, [&](auto element, auto w, auto v, const HeadLaunch& to) {
    using T = decltype(element);
    constexpr int W = decltype(w)::value, V = decltype(v)::value;
    partials.splits = to.plan.runs;  // no more than there is room for, where fewer fill the device
    return launch<qk_norm_rope_backward_heads<T, W, V>>(to.grid, stream, sides, to.plan);
  });
  if (error != cudaSuccess || sums == nullptr) return error;
  return sum_columns(p.param_dtype, p.batch, p.width, partials,
                     {plain_gradients(nullptr, p.dq_weight), plain_gradients(nullptr, p.dk_weight)}, stream);
}

}  // namespace twostep::cuda
