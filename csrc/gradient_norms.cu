// gradient_norms on CUDA; the maths and the bytes are in gradient_norms.h, both stages in cuda/sample_sums.cu.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sample_sums.h"

namespace twostep::cuda {

cudaError_t gradient_norms(const GradientNorms& p, cudaStream_t stream) {
  if (p.dtype == Dtype::f64) return cudaErrorNotSupported;
  const int64_t number = int64_t(sizeof(float));
  if (p.batch == 0 || p.size == 0) return zero({p.norms, p.total}, {p.batch * number, number}, stream);
  return sum_samples({p.dtype, p.dtype, p.batch, p.size, p.g, {}}, p.partials, {true, 0., p.norms, p.total}, stream);
}

}  // namespace twostep::cuda
