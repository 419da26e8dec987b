// swiglu on CUDA; the maths and the bytes are in swiglu.h.
//
// No reduction, so only loads in flight count: a thread takes two vectors of each tensor, issues all its loads, then
// computes. A block takes a piece of one row; rows that follow each other without a gap in every tensor are taken as
// one long row, so that short rows leave no threads idle.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace twostep::cuda {
namespace {

constexpr int block = 256;
constexpr int per_thread = 2;

struct Pieces {
  int64_t rows, width, pieces;  // pieces of a row
  int64_t length;               // rows of a sample
};

// exp and division at half their cost and some 2 ulp, where the result is rounded to 16 bits; else in full.
template <class T>
__device__ inline float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(1.f, 1.f + __expf(-x));
  } else {
    return 1.f / (1.f + expf(-x));
  }
}

// f(b, l, columns): the piece of a row that this block takes next, and this thread's first elements in it.
template <int W, class F>
__device__ inline void for_pieces(const Pieces& of, F&& f) {
  for (int64_t item = blockIdx.x; item < of.rows * of.pieces; item += gridDim.x) {
    const int64_t row = item / of.pieces, b = row / of.length;
    const int64_t piece = (item - row * of.pieces) * blockDim.x * per_thread;
    int64_t columns[per_thread];
#pragma unroll
    for (int n = 0; n < per_thread; ++n) columns[n] = (piece + n * int(blockDim.x) + threadIdx.x) * W;
    f(b, row - b * of.length, columns);
  }
}

template <class T, class Pointer>
__device__ inline auto row_at(const RowsOf<Pointer>& rows, int64_t b, int64_t l) {
  using Element = std::conditional_t<std::is_same_v<Pointer, const void*>, const T, T>;
  return static_cast<Element*>(rows.data) + b * rows.batch_stride + l * rows.token_stride;
}

template <class T, int W>
__global__ void __launch_bounds__(block) swiglu_forward_rows(const SwigluForward p, const Rows y, const Pieces of) {
  for_pieces<W>(of, [&](int64_t b, int64_t l, const int64_t (&columns)[per_thread]) {
    float a[per_thread][W], up[per_thread][W];
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      if (columns[n] >= of.width) continue;
      load<W>(row_at<T>(p.gate, b, l) + columns[n], a[n]);
      load<W>(row_at<T>(p.up, b, l) + columns[n], up[n]);
    }
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      if (columns[n] >= of.width) continue;
#pragma unroll
      for (int e = 0; e < W; ++e) a[n][e] *= sigmoid<T>(a[n][e]) * up[n][e];
      store<W>(row_at<T>(y, b, l) + columns[n], a[n]);
    }
  });
}

template <class T, int W>
__global__ void __launch_bounds__(block) swiglu_backward_rows(const SwigluBackward p, const Pieces of) {
  for_pieces<W>(of, [&](int64_t b, int64_t l, const int64_t (&columns)[per_thread]) {
    float dy[per_thread][W], a[per_thread][W], up[per_thread][W];
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      if (columns[n] >= of.width) continue;
      load<W>(row_at<T>(p.dy, b, l) + columns[n], dy[n]);
      load<W>(row_at<T>(p.gate, b, l) + columns[n], a[n]);
      load<W>(row_at<T>(p.up, b, l) + columns[n], up[n]);
    }
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      if (columns[n] >= of.width) continue;
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const float s = sigmoid<T>(a[n][e]), silu = a[n][e] * s;
        a[n][e] = dy[n][e] * up[n][e] * (s + silu * (1.f - s));
        up[n][e] = dy[n][e] * silu;
      }
      store<W>(row_at<T>(p.dgate, b, l) + columns[n], a[n]);
      store<W>(row_at<T>(p.dup, b, l) + columns[n], up[n]);
    }
  });
}

// Joins what has no gaps: every tensor's rows, then its samples.
class Joining {
 public:
  Joining(int64_t batch, int64_t length, int64_t width) : batch_(batch), length_(length), width_(width) {}
  template <class Pointer>
  Joining& rows(const RowsOf<Pointer>& x) {
    joins_ &= (length_ == 1 || x.token_stride == width_) && (batch_ == 1 || x.batch_stride == length_ * width_);
    return *this;
  }
  explicit operator bool() const { return joins_; }

 private:
  int64_t batch_, length_, width_;
  bool joins_ = true;
};

// f(T, vector width, pieces, grid). Threads are cut to the row, so that its last piece is not mostly idle.
template <class F>
cudaError_t launch_pieces(Dtype dtype, int64_t batch, int64_t length, int64_t width, bool joins, bool aligned, F&& f) {
  const int64_t rows = joins ? 1 : batch * length, row = joins ? batch * length * width : width;
  return with_dtype(dtype, [&](auto element) {
    constexpr int wide = wide_vector<decltype(element)>;
    const auto plan = [&](int64_t vectors) {
      const int64_t pieces = ceil_div(vectors, block * per_thread);
      const int64_t threads = ceil_div(ceil_div(vectors, pieces * per_thread), 32) * 32;
      return std::pair<Pieces, Grid>{{rows, row, pieces, joins ? 1 : length},
                                     {std::min(rows * pieces, max_blocks), dim3(unsigned(threads)), 0}};
    };
    if (aligned && row % wide == 0) return f(element, std::integral_constant<int, wide>{}, plan(row / wide));
    return f(element, std::integral_constant<int, 1>{}, plan(row));
  });
}

}  // namespace

cudaError_t swiglu_forward(const SwigluForward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0 || p.width == 0) return cudaSuccess;
  const Rows y{p.y, p.length * p.width, p.width};
  Joining joins(p.batch, p.length, p.width);
  joins.rows(p.gate).rows(p.up);
  Alignment aligned(p.dtype);
  const int64_t bytes = bytes_of(p.dtype);
  if (joins) {
    aligned.pointer(p.gate.data).pointer(p.up.data).pointer(p.y);
  } else {
    aligned.rows(p.gate, bytes).rows(p.up, bytes).rows(y, bytes);
  }
  return launch_pieces(p.dtype, p.batch, p.length, p.width, bool(joins), bool(aligned),
                       [&](auto element, auto w, const auto& plan) {
                         return launch<swiglu_forward_rows<decltype(element), decltype(w)::value>>(plan.second, stream,
                                                                                                   p, y, plan.first);
                       });
}

cudaError_t swiglu_backward(const SwigluBackward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0 || p.width == 0) return cudaSuccess;
  Joining joins(p.batch, p.length, p.width);
  joins.rows(p.dy).rows(p.gate).rows(p.up).rows(p.dgate).rows(p.dup);
  Alignment aligned(p.dtype);
  const int64_t bytes = bytes_of(p.dtype);
  if (joins) {
    aligned.pointer(p.dy.data).pointer(p.gate.data).pointer(p.up.data).pointer(p.dgate.data).pointer(p.dup.data);
  } else {
    aligned.rows(p.dy, bytes).rows(p.gate, bytes).rows(p.up, bytes).rows(p.dgate, bytes).rows(p.dup, bytes);
  }
  return launch_pieces(
      p.dtype, p.batch, p.length, p.width, bool(joins), bool(aligned), [&](auto element, auto w, const auto& plan) {
        return launch<swiglu_backward_rows<decltype(element), decltype(w)::value>>(plan.second, stream, p, plan.first);
      });
}

}  // namespace twostep::cuda
