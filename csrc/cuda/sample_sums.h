// Sums over samples, in two stages: a block adds up one piece of a sample, and a second kernel adds the pieces.
#pragma once

#include <cuda_runtime.h>

#include "../views.h"

namespace twostep::cuda {

// Of |x - y|, or where y is absent of x^2. y has x's dtype, or 16 bits where x is float32.
struct SampleTerms {
  Dtype dtype, other_dtype;
  int64_t batch, size;
  ConstSamples x, y;
};

// What the second stage makes of the sums: per_sample[b] = 1 / max(sum_b / size, eps), or, with roots, sqrt(sum_b); and
// where total is not null, sqrt of the sum of all.
struct SampleResults {
  bool roots;
  double eps;
  void* per_sample;  // [batch] floats
  void* total;       // one float, or null
};

// partials holds [batch, ceil(size / sample_piece)] floats. Neither stage uses atomics; the order of additions depends
// on the shape alone. batch and size are not 0.
cudaError_t sum_samples(const SampleTerms&, void* partials, const SampleResults&, cudaStream_t);

}  // namespace twostep::cuda
