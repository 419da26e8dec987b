// swiglu: y = silu(gate) * up, silu(a) = a * sigmoid(a)
//
// Backward, s = sigmoid(gate), recomputed from the inputs:
//   dgate = dy * up * s * (1 + gate * (1 - s))        dup = dy * gate * s
//
// Bytes, W = one of the tensors: forward 3W, backward 5W.
#pragma once

#include "views.h"

namespace twostep {

struct SwigluForward {
  Dtype dtype;
  int64_t batch, length, width;
  ConstRows gate, up;
  void* y;  // [batch, length, width], contiguous
};

struct SwigluBackward {
  Dtype dtype;
  int64_t batch, length, width;
  ConstRows dy, gate, up;
  Rows dgate, dup;  // may be the two halves of one [batch, length, 2 * width] tensor
};

}  // namespace twostep
