// Ops on samples, [batch, size], element by element: how they are cut into blocks, and which kernel runs.
//
// No reduction here, so only loads in flight count: a thread takes two vectors of each tensor, issues all its loads,
// then computes. A vector is 16 bytes of the narrowest tensor; beside it, a float32 tensor gives two vectors of 16
// bytes. A block takes a piece of one sample; samples that follow each other without a gap in every tensor are taken as
// one long sample, so that small ones leave no threads idle.
#pragma once

#include "launch.cuh"
#include "vectors.cuh"

namespace twostep::cuda {

constexpr int samples_block = 256;
constexpr int samples_per_thread = 2;

struct SamplePieces {
  int64_t batch, size, pieces;  // pieces of a sample
};

// f(sample, elements): the piece of a sample that this block takes next, and where this thread's vectors in it begin.
template <int W, class F>
__device__ inline void for_sample_pieces(const SamplePieces& of, F&& f) {
  for (int64_t item = blockIdx.x; item < of.batch * of.pieces; item += gridDim.x) {
    const int64_t b = item / of.pieces;
    const int64_t piece = (item - b * of.pieces) * blockDim.x * samples_per_thread;
    int64_t elements[samples_per_thread];
#pragma unroll
    for (int n = 0; n < samples_per_thread; ++n) elements[n] = (piece + n * int(blockDim.x) + threadIdx.x) * W;
    f(b, elements);
  }
}

template <class T>
__device__ inline const T* sample_at(const ConstSamples& samples, int64_t b) {
  return static_cast<const T*>(samples.data) + b * samples.stride;
}

// f(state's type, network's type): one type, or float beside 16 bits.
template <class F>
cudaError_t with_two_dtypes(Dtype state, Dtype network, F&& f) {
  return with_dtype(state, [&](auto type) {
    using T = decltype(type);
    if (network == state) return f(type, type);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (network == Dtype::bf16) return f(type, __nv_bfloat16{});
      if (network == Dtype::f16) return f(type, __half{});
    }
    return cudaErrorNotSupported;
  });
}

// What decides how samples are cut: whether they are alike, joined, and aligned.
class SampleLayout {
 public:
  SampleLayout(int64_t batch, int64_t size, bool alike) : batch_(batch), size_(size), joins_(alike) {}
  SampleLayout& samples(const ConstSamples& x, Dtype dtype) {
    if (x.data == nullptr) return *this;
    joins_ &= batch_ == 1 || x.stride == size_;
    strides_aligned_ &= x.stride * bytes_of(dtype) % 16 == 0;
    pointers_.pointer(x.data);
    return *this;
  }
  // A contiguous output.
  SampleLayout& output(const void* y, Dtype dtype) { return samples({y, size_}, dtype); }

  int64_t batch() const { return joins_ ? 1 : batch_; }
  int64_t size() const { return joins_ ? batch_ * size_ : size_; }
  bool fits(int width) const {
    return bool(pointers_) && (joins_ || batch_ == 1 || strides_aligned_) && size() % width == 0;
  }

 private:
  int64_t batch_, size_;
  bool joins_, strides_aligned_ = true;
  Alignment pointers_{Dtype::f32};
};

// f(vector width, pieces, grid). Threads are cut to the sample, so that its last piece is not mostly idle.
template <int Wide, class F>
cudaError_t launch_samples(const SampleLayout& layout, F&& f) {
  const auto plan = [&](auto w) {
    const int64_t vectors = ceil_div(layout.size(), int64_t(w));
    const int64_t pieces = ceil_div(vectors, samples_block * samples_per_thread);
    const int64_t threads = ceil_div(ceil_div(vectors, pieces * samples_per_thread), 32) * 32;
    const SamplePieces of{layout.batch(), layout.size(), pieces};
    return f(w, of, Grid{std::min(of.batch * pieces, max_blocks), dim3(unsigned(threads)), 0});
  };
  if (layout.fits(Wide)) return plan(std::integral_constant<int, Wide>{});
  return plan(std::integral_constant<int, 1>{});
}

template <class X, class V>
constexpr int wide_pair = 16 / int(sizeof(X) < sizeof(V) ? sizeof(X) : sizeof(V));

}  // namespace twostep::cuda
