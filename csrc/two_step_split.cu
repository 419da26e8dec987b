// two_step_split on CUDA; the maths and the bytes are in two_step_split.h, how samples are cut in cuda/samples.cuh.
#include "cuda/kernels.h"
#include "cuda/samples.cuh"

namespace twostep::cuda {
namespace {

template <class X, class V, int W>
__global__ void __launch_bounds__(samples_block)
    two_step_split_forward_samples(const TwoStepSplitForward p, const SamplePieces of) {
  const float step = float(p.step);
  for_sample_pieces<W>(of, [&](int64_t b, const int64_t (&elements)[samples_per_thread]) {
    float noise[samples_per_thread][W], v[samples_per_thread][W];
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
      load<W>(sample_at<X>(p.noise, b) + elements[n], noise[n]);
      load<W>(sample_at<V>(p.v, b) + elements[n], v[n]);
    }
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
      float z[W];
#pragma unroll
      for (int e = 0; e < W; ++e) {
        z[e] = noise[n][e] + step * v[n][e];
        noise[n][e] -= v[n][e];
      }
      store<W>(static_cast<X*>(p.z) + b * of.size + elements[n], z);
      store<W>(static_cast<X*>(p.x_a) + b * of.size + elements[n], noise[n]);
    }
  });
}

// Which gradients there are is uniform over the launch. Four blocks on a multiprocessor, 64 registers a thread: left to
// itself, the compiler aims for five on sm_120 and spills.
template <class X, class V, int W>
__global__ void __launch_bounds__(samples_block, 4)
    two_step_split_backward_samples(const TwoStepSplitBackward p, const SamplePieces of) {
  const bool inherits = p.inherited.data != nullptr, has_own = p.own.data != nullptr;
  for_sample_pieces<W>(of, [&](int64_t b, const int64_t (&elements)[samples_per_thread]) {
    float coefficient = float(p.coefficient);
    if (p.factors != nullptr) coefficient *= __ldg(static_cast<const float*>(p.factors) + b * p.factor_stride);
    float inherited[samples_per_thread][W], own[samples_per_thread][W];
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
      if (inherits) load<W>(sample_at<X>(p.inherited, b) + elements[n], inherited[n]);
      if (has_own) load<W>(sample_at<X>(p.own, b) + elements[n], own[n]);
    }
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
      float g[W];
#pragma unroll
      for (int e = 0; e < W; ++e) {
        g[e] = inherits ? coefficient * inherited[n][e] : 0.f;
        if (has_own) g[e] -= own[n][e];
      }
      store<W>(static_cast<V*>(p.dv) + b * of.size + elements[n], g);
    }
  });
}

}  // namespace

cudaError_t two_step_split_forward(const TwoStepSplitForward& p, cudaStream_t stream) {
  return with_two_dtypes(p.dtype, p.velocity_dtype, [&](auto state, auto velocity) {
    if (p.batch == 0 || p.size == 0) return cudaSuccess;
    using X = decltype(state);
    using V = decltype(velocity);
    SampleLayout layout(p.batch, p.size, true);
    layout.samples(p.noise, p.dtype).samples(p.v, p.velocity_dtype).output(p.z, p.dtype).output(p.x_a, p.dtype);
    return launch_samples<wide_pair<X, V>>(layout, [&](auto w, const SamplePieces& of, const Grid& grid) {
      return launch<two_step_split_forward_samples<X, V, decltype(w)::value>>(grid, stream, p, of);
    });
  });
}

cudaError_t two_step_split_backward(const TwoStepSplitBackward& p, cudaStream_t stream) {
  return with_two_dtypes(p.dtype, p.velocity_dtype, [&](auto state, auto velocity) {
    if (p.batch == 0 || p.size == 0) return cudaSuccess;
    using X = decltype(state);
    using V = decltype(velocity);
    SampleLayout layout(p.batch, p.size, p.factors == nullptr || p.factor_stride == 0);
    layout.samples(p.inherited, p.dtype).samples(p.own, p.dtype).output(p.dv, p.velocity_dtype);
    return launch_samples<wide_pair<X, V>>(layout, [&](auto w, const SamplePieces& of, const Grid& grid) {
      return launch<two_step_split_backward_samples<X, V, decltype(w)::value>>(grid, stream, p, of);
    });
  });
}

}  // namespace twostep::cuda
