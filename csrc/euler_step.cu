// euler_step on CUDA; the maths and the bytes are in euler_step.h, how samples are cut in cuda/samples.cuh.
#include "cuda/kernels.h"
#include "cuda/samples.cuh"

namespace twostep::cuda {
namespace {

__device__ inline float delta_of(double delta, const void* deltas, int64_t b) {
  return deltas != nullptr ? __ldg(static_cast<const float*>(deltas) + b) : float(delta);
}

template <class X, class V, int W>
__global__ void __launch_bounds__(samples_block)
    euler_step_forward_samples(const EulerStepForward p, const SamplePieces of) {
  for_sample_pieces<W>(of, [&](int64_t b, const int64_t (&elements)[samples_per_thread]) {
    const float delta = delta_of(p.delta, p.deltas, b);
    float x[samples_per_thread][W], v[samples_per_thread][W];
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
      load<W>(sample_at<X>(p.x, b) + elements[n], x[n]);
      load<W>(sample_at<V>(p.v, b) + elements[n], v[n]);
    }
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
#pragma unroll
      for (int e = 0; e < W; ++e) x[n][e] += delta * v[n][e];
      store<W>(static_cast<X*>(p.y) + b * of.size + elements[n], x[n]);
    }
  });
}

template <class X, class V, int W>
__global__ void __launch_bounds__(samples_block)
    euler_step_backward_samples(const EulerStepBackward p, const SamplePieces of) {
  for_sample_pieces<W>(of, [&](int64_t b, const int64_t (&elements)[samples_per_thread]) {
    const float delta = delta_of(p.delta, p.deltas, b);
    float g[samples_per_thread][W];
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] < of.size) load<W>(sample_at<X>(p.dy, b) + elements[n], g[n]);
    }
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
#pragma unroll
      for (int e = 0; e < W; ++e) g[n][e] *= delta;
      store<W>(static_cast<V*>(p.dv) + b * of.size + elements[n], g[n]);
    }
  });
}

}  // namespace

cudaError_t euler_step_forward(const EulerStepForward& p, cudaStream_t stream) {
  return with_two_dtypes(p.dtype, p.velocity_dtype, [&](auto state, auto velocity) {
    if (p.batch == 0 || p.size == 0) return cudaSuccess;
    using X = decltype(state);
    using V = decltype(velocity);
    SampleLayout layout(p.batch, p.size, p.deltas == nullptr);
    layout.samples(p.x, p.dtype).samples(p.v, p.velocity_dtype).output(p.y, p.dtype);
    return launch_samples<wide_pair<X, V>>(layout, [&](auto w, const SamplePieces& of, const Grid& grid) {
      return launch<euler_step_forward_samples<X, V, decltype(w)::value>>(grid, stream, p, of);
    });
  });
}

cudaError_t euler_step_backward(const EulerStepBackward& p, cudaStream_t stream) {
  return with_two_dtypes(p.dtype, p.velocity_dtype, [&](auto state, auto velocity) {
    if (p.batch == 0 || p.size == 0) return cudaSuccess;
    using X = decltype(state);
    using V = decltype(velocity);
    SampleLayout layout(p.batch, p.size, p.deltas == nullptr);
    layout.samples(p.dy, p.dtype).output(p.dv, p.velocity_dtype);
    return launch_samples<wide_pair<X, V>>(layout, [&](auto w, const SamplePieces& of, const Grid& grid) {
      return launch<euler_step_backward_samples<X, V, decltype(w)::value>>(grid, stream, p, of);
    });
  });
}

}  // namespace twostep::cuda
