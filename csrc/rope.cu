// rope on CUDA; the maths and the bytes are in rope.h, how heads are dealt in cuda/heads.cuh.
#include "cuda/heads.cuh"
#include "cuda/kernels.h"

namespace twostep::cuda {
namespace {

constexpr int in_flight = 4;  // vectors a thread loads at once: 64 bytes, 64 KB a multiprocessor

template <class T, int W, int V>
__global__ void __launch_bounds__(heads_block, heads_resident / heads_block)
    rope_heads(const Rope p, const HeadPlan plan) {
  const Team<W, V> team(p.width);
  HeadRun run(plan, blockIdx.x, p.length);
  const float direction = p.inverse ? -1.f : 1.f;
  constexpr int flight = heads_in_flight<in_flight, V>;
  const int heads = int(p.x.heads);
  float turns[team.held][W];
  for (int i = run.token; i < run.count; i += plan.token_slots) {
    run.forget();
    const int64_t l = run.begin + i;
    const float* freqs = frequencies_of(p.freqs, run.b, l);
    const T* from = heads_of<T>(p.x, run.b, l);
    T* const to = static_cast<T*>(p.y) + (run.b * p.length + l) * (heads * p.width);
    if (V > 0) team.columns([&](int v, int column) { load<W>(freqs + column, turns[v]); });
    for (int first = run.head; first < heads; first += flight * plan.head_slots) {
      Head<T, W, V> x[flight];
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        const int h = first + n * plan.head_slots;
        if (h < heads) x[n].fetch(team, from + h * p.x.head_stride);
      }
#pragma unroll
      for (int n = 0; n < flight; ++n) {
        const int h = first + n * plan.head_slots;
        if (h >= heads) continue;
        T* y = to + h * team.width;
        team.columns([&](int v, int column) {
          float y_[W];
          if (V == 0) load<W>(freqs + column, turns[v]);
          x[n].read(v, column, y_);
          turn(turns[v], direction, y_);
          store<W>(y + column, y_);
        });
      }
    }
  }
}

}  // namespace

cudaError_t rope(const Rope& p, cudaStream_t stream) {
  if (p.dtype == Dtype::f64 || p.width < 2 || p.width % 2 != 0 || p.width > max_head_width)
    return cudaErrorNotSupported;
  if (p.batch == 0 || p.length == 0 || p.x.heads == 0) return cudaSuccess;
  Alignment aligned(Dtype::f32);
  aligned.heads(p.x, bytes_of(p.dtype)).parameter(p.freqs).pointer(p.y);
  const HeadProblem problem{p.batch, p.length, p.width, p.x.heads, 1, bool(aligned), in_flight};
  return launch_heads(p.dtype, problem, [&](auto element, auto w, auto v, const HeadLaunch& to) {
    return launch<rope_heads<decltype(element), decltype(w)::value, decltype(v)::value>>(to.grid, stream, p, to.plan);
  });
}

}  // namespace twostep::cuda
