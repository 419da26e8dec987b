// gated_residual: out = x + act(gate) * norm(z) * weight
//
// act is tanh or the identity, norm is RMS or the identity; gate and weight may be absent (then 1).
// With zhat = norm(z), a = act(gate), m = a * weight, g = dout * m:
//   dx = dout (the caller returns it, nothing is written)
//   dz = rstd * (g - zhat * mean(g * zhat))        RMS;      dz = g without a norm
//   dgate = act'(gate) * weight * sum_l dout * zhat          dweight = sum_b a * sum_l dout * zhat
// so one accumulator a sample, A = sum_l dout * zhat, gives both. With a gate per token, dgate[b, l] is
// written directly and A accumulates dout * zhat * a for dweight.
//
// Bytes, U = one activation tensor: forward 3U, backward 3U (+ 1U forward, 2U backward for a per-token gate).
#pragma once

#include "views.h"

namespace twostep {

struct GatedResidualForward {
  Dtype dtype;        // of x, z and out
  Dtype param_dtype;  // of gate and weight: dtype, or f32 where dtype is bf16 or f16
  Norm norm;          // rms or none
  GateAct gate_act;
  double eps;
  int64_t batch, length, width;
  ConstRows x, z;
  ConstRows gate;      // absent, per sample (token_stride 0) or per token
  const void* weight;  // [width] or null
  void* out;           // [batch, length, width], contiguous
  void* rstd;          // [batch, length], accumulation type; null without a norm
};

struct GatedResidualBackward {
  Dtype dtype;        // of dout, z and dz
  Dtype param_dtype;  // of gate, weight and their gradients
  Norm norm;
  GateAct gate_act;
  int64_t batch, length, width;
  bool gate_per_token;  // decides the shape of dgate
  ConstRows dout, z;
  ConstRows gate;
  const void* weight;
  const void* rstd;  // null without a norm
  void* dz;          // [batch, length, width], contiguous
  void* dgate;       // [batch, width], or [batch, length, width] where gate_per_token; null where not wanted
  void* dweight;     // [width], or null where not wanted
  // [batch, splits, width]: A. Null where neither dweight nor a per-sample dgate is wanted.
  Partials partials;
};

}  // namespace twostep
