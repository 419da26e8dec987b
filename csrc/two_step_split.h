// two_step_split: what the first of two steps gives: the state that the second step starts from, and its own image
//
//   z = noise + (mid - 1) * v          x_a = noise - v          v = first(noise), from sigma 1 to sigma mid and to 0
// Backward, g_z the gradient of z found by the second step ("inherited"), g_a the gradient of x_a ("own"):
//   dv_b = weight * factor_b * (mid - 1) * g_z - g_a
// in v's dtype with one rounding: the inherited gradient is injected where the first step's own gradient is made.
// weight is the share that is inherited (1: the exact gradient of the unrolled pair; .1 in Z-Image Turbo++, arXiv
// 2606.12575, appendix A); factor, a number on the device for all samples or for each, is a clip whose value the host
// need not wait for. Either gradient may be absent.
//
// Two passes are all that a two-step backward spends here: this forward, and this backward, which is also a function of
// its own (ops.inject_gradient) for modes that keep no graph between the two. The second step's end is euler_step.
//
// Bytes, X = the state, V = the velocity: forward 3X + V, backward 2X + V.
#pragma once

#include "views.h"

namespace twostep {

struct TwoStepSplitForward {
  Dtype dtype;           // of noise, z and x_a
  Dtype velocity_dtype;  // of v: dtype, or bf16 or f16 where dtype is f32
  int64_t batch, size;
  double step;  // mid - 1
  ConstSamples noise, v;
  void *z, *x_a;  // [batch, size], contiguous
};

struct TwoStepSplitBackward {
  Dtype dtype;           // of inherited and own
  Dtype velocity_dtype;  // of dv
  int64_t batch, size;
  double coefficient;           // weight * (mid - 1)
  const void* factors;          // of the accumulation type, or null for 1
  int64_t factor_stride;        // 0: one for all samples; 1: one a sample
  ConstSamples inherited, own;  // either may be absent
  void* dv;                     // [batch, size], contiguous
};

}  // namespace twostep
