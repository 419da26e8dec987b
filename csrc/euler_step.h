// euler_step: y = x + delta * v            delta is one number, or one number a sample
//
// A sampler's step from sigma a to sigma b (delta = b - a), and with delta = -sigma the clean prediction, of a flow
// whose velocity is noise - image (flow matching, arXiv 2210.02747).
//   dx = dy (the caller returns it, nothing is written)        dv = delta * dy
// x, y and dy are the sampler's state; v and dv belong to the network, and may be bf16 or f16 beside a float32 state.
//
// Bytes, X = the state, V = the velocity: forward 2X + V, backward X + V.
#pragma once

#include "views.h"

namespace twostep {

struct EulerStepForward {
  Dtype dtype;           // of x and y
  Dtype velocity_dtype;  // of v: dtype, or bf16 or f16 where dtype is f32
  int64_t batch, size;
  double delta;        // where deltas is null
  const void* deltas;  // [batch] of the accumulation type, or null
  ConstSamples x, v;
  void* y;  // [batch, size], contiguous
};

struct EulerStepBackward {
  Dtype dtype;           // of dy
  Dtype velocity_dtype;  // of dv
  int64_t batch, size;
  double delta;
  const void* deltas;
  ConstSamples dy;
  void* dv;  // [batch, size], contiguous
};

}  // namespace twostep
