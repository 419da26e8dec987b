// What a kernel sees of a tensor: a pointer, strides in elements, a dtype. No torch here.
//
// Every op works on rows: x is [batch, length, width] with a dense last dimension, so two strides say all.
// A stride of 0 broadcasts: modulation per sample has token_stride 0, a frequency table shared by the batch
// has batch_stride 0. Indices and strides are 64-bit throughout: a tensor may hold more than 2^31 elements.
#pragma once

#include <cstdint>

namespace twostep {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Element (b, l, d) of a [batch, length, width] tensor is data[b * batch_stride + l * token_stride + d].
// data is null where an optional tensor is absent.
template <class Pointer>
struct RowsOf {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
};
using Rows = RowsOf<void*>;
using ConstRows = RowsOf<const void*>;

// Element (b, l, h, d) of a [batch, length, heads, width] tensor, the last dimension dense.
template <class Pointer>
struct HeadsOf {
  Pointer data = nullptr;
  int64_t heads = 0;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};
using Heads = HeadsOf<void*>;
using ConstHeads = HeadsOf<const void*>;

// Element i of sample b of a [batch, size] tensor is data[b * stride + i]: for ops that know no rows, such as the steps
// of a sampler. A stride of 0 gives every sample the same elements.
template <class Pointer>
struct SamplesOf {
  Pointer data = nullptr;
  int64_t stride = 0;
};
using ConstSamples = SamplesOf<const void*>;

// A sum over a sample is cut into pieces of so many elements, each is added up on its own, and the pieces' sums in
// order, in double: results depend on the shape alone. A piece is what a block of 256 threads takes in with all its
// loads in flight, and what a first-level cache holds.
constexpr int64_t sample_piece = 4096;

enum class Norm : int { none = 0, rms = 1, layer = 2 };
enum class GateAct : int { none = 0, tanh = 1 };

// Gradients of parameters are sums over rows. A backward kernel cuts each sample's `length` rows into
// `splits` runs of ceil(length / splits) rows (the last ones may be shorter or empty), accumulates each run
// in order, writes the run's sums to `partials`, and a second stage adds the runs up in a fixed order.
// So results do not depend on thread counts or scheduling. What partials holds is said beside each op;
// its elements are of the accumulation type: float, or double where the activations are f64.
struct Partials {
  void* data = nullptr;
  int64_t splits = 1;
};

}  // namespace twostep
