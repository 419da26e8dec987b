// First stage: a block of 256 threads to a piece of 4096 elements, 16 a thread, all loads issued before the first is
// used; then shuffles and one barrier. 256 blocks for four latents of 1024 x 1024 pixels, two on each multiprocessor.
// Second stage: a block to a sample, and one more to the total; in double, since a large sample has many pieces and
// there are so few additions that their rate does not count. Reads 4 bytes for every 16 KB of the first stage.
#include "sample_sums.h"

#include "samples.cuh"
#include "team.cuh"

namespace twostep::cuda {
namespace {

constexpr int block = 256;

template <bool Difference, class X, class Y, int W>
__global__ void __launch_bounds__(block) sum_pieces(const SampleTerms p, float* const partials, const int64_t pieces) {
  constexpr int vectors = int(sample_piece) / (block * W);
  const Team<1, 0> team(0);
  TeamSum sum(team, shared_memory());
  const int64_t b = blockIdx.x / pieces, begin = (blockIdx.x - b * pieces) * sample_piece;
  const X* const x = sample_at<X>(p.x, b);
  const Y* const y = sample_at<Y>(p.y, b);
  float terms[vectors][W], others[vectors][W];
#pragma unroll
  for (int n = 0; n < vectors; ++n) {
    const int64_t at = begin + (n * block + threadIdx.x) * W;
    if (at >= p.size) continue;
    load<W>(x + at, terms[n]);
    if (Difference) load<W>(y + at, others[n]);
  }
  float total[1] = {0.f};
#pragma unroll
  for (int n = 0; n < vectors; ++n) {
    if (begin + (n * block + threadIdx.x) * W >= p.size) continue;
#pragma unroll
    for (int e = 0; e < W; ++e) {
      total[0] += Difference ? fabsf(terms[n][e] - others[n][e]) : terms[n][e] * terms[n][e];
    }
  }
  sum(team, total);
  if (threadIdx.x == 0) __stwb(partials + blockIdx.x, total[0]);
}

// The sum of `count` floats, valid in thread 0.
__device__ double sum_all(const float* from, int64_t count) {
  double* const line = reinterpret_cast<double*>(shared_memory());
  double total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += block) total += double(__ldg(from + i));
  for (int distance = block / 2; distance > 0; distance /= 2) {
    shared_store(line + threadIdx.x, total);
    __syncthreads();
    if (int(threadIdx.x) < distance) total += shared_load(line + threadIdx.x + distance);
    __syncthreads();  // before the next round overwrites these
  }
  return total;
}

__global__ void __launch_bounds__(block)
    finish_samples(const float* const partials, const int64_t batch, const int64_t size, const int64_t pieces,
                   const SampleResults to) {
  const int64_t b = blockIdx.x;
  const bool all = b == batch;
  const double sum = sum_all(all ? partials : partials + b * pieces, all ? batch * pieces : pieces);
  if (threadIdx.x != 0) return;
  if (to.roots) {
    __stwb(static_cast<float*>(all ? to.total : to.per_sample) + (all ? 0 : b), float(sqrt(sum)));
  } else {
    const double mean = sum / double(size);
    // NaN stays NaN: it is not below eps. Infinity becomes NaN, by 0 * mean: 1 / infinity would hide it.
    __stwb(static_cast<float*>(to.per_sample) + b, float(1. / (mean < to.eps ? to.eps : mean) + 0. * mean));
  }
}

template <bool Difference, class X, class Y>
cudaError_t sum_pieces_of(const SampleTerms& p, float* partials, int64_t pieces, cudaStream_t stream) {
  const Grid grid{p.batch * pieces, dim3(block), TeamSum::bytes};
  SampleLayout layout(p.batch, p.size, false);
  layout.samples(p.x, p.dtype).samples(p.y, p.other_dtype);
  constexpr int wide = wide_pair<X, Y>;
  if (layout.fits(wide)) return launch<sum_pieces<Difference, X, Y, wide>>(grid, stream, p, partials, pieces);
  return launch<sum_pieces<Difference, X, Y, 1>>(grid, stream, p, partials, pieces);
}

}  // namespace

cudaError_t sum_samples(const SampleTerms& p, void* partials, const SampleResults& results, cudaStream_t stream) {
  const int64_t pieces = ceil_div(p.size, sample_piece);
  float* const sums = static_cast<float*>(partials);
  const cudaError_t error =
      p.y.data == nullptr
          ? with_dtype(p.dtype,
                       [&](auto x) { return sum_pieces_of<false, decltype(x), decltype(x)>(p, sums, pieces, stream); })
          : with_two_dtypes(p.dtype, p.other_dtype, [&](auto x, auto y) {
              return sum_pieces_of<true, decltype(x), decltype(y)>(p, sums, pieces, stream);
            });
  if (error != cudaSuccess) return error;
  const Grid grid{p.batch + (results.total != nullptr ? 1 : 0), dim3(block), block * int(sizeof(double))};
  return launch<finish_samples>(grid, stream, static_cast<const float*>(sums), p.batch, p.size, pieces, results);
}

}  // namespace twostep::cuda
