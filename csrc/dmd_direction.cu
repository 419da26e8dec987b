// dmd_direction on CUDA; the maths and the bytes are in dmd_direction.h. Three kernels: the sums of |x - real|
// (cuda/sample_sums.cu, two stages), then one pass that writes the direction.
#include "cuda/kernels.h"
#include "cuda/sample_sums.h"
#include "cuda/samples.cuh"

namespace twostep::cuda {
namespace {

template <class P, int W>
__global__ void __launch_bounds__(samples_block) dmd_direction_samples(const DmdDirection p, const SamplePieces of) {
  for_sample_pieces<W>(of, [&](int64_t b, const int64_t (&elements)[samples_per_thread]) {
    const float scale = __ldg(static_cast<const float*>(p.scales) + b);
    float real[samples_per_thread][W], fake[samples_per_thread][W];
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
      load<W>(sample_at<P>(p.real, b) + elements[n], real[n]);
      load<W>(sample_at<P>(p.fake, b) + elements[n], fake[n]);
    }
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) {
      if (elements[n] >= of.size) continue;
#pragma unroll
      for (int e = 0; e < W; ++e) fake[n][e] = (fake[n][e] - real[n][e]) * scale;
      store<W>(static_cast<float*>(p.direction) + b * of.size + elements[n], fake[n]);
    }
  });
}

}  // namespace

cudaError_t dmd_direction(const DmdDirection& p, cudaStream_t stream) {
  return with_two_dtypes(p.dtype, p.prediction_dtype, [&](auto, auto prediction) {
    if (p.batch == 0 || p.size == 0) return cudaSuccess;
    using P = decltype(prediction);
    const SampleTerms terms{p.dtype, p.prediction_dtype, p.batch, p.size, p.x, p.real};
    const cudaError_t error = sum_samples(terms, p.partials, {false, p.eps, p.scales, nullptr}, stream);
    if (error != cudaSuccess) return error;
    SampleLayout layout(p.batch, p.size, false);
    const Dtype type = p.prediction_dtype;
    layout.samples(p.real, type).samples(p.fake, type).output(p.direction, Dtype::f32);
    return launch_samples<wide_vector<P>>(layout, [&](auto w, const SamplePieces& of, const Grid& grid) {
      return launch<dmd_direction_samples<P, decltype(w)::value>>(grid, stream, p, of);
    });
  });
}

}  // namespace twostep::cuda
