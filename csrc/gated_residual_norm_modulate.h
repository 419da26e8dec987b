// gated_residual_norm_modulate: the seam between two branches of a transformer block, in one pass.
//
//   out = x + act(gate) * post_norm(z) * post_weight            (gated_residual)
//   h   = norm(out) * pre_weight * (1 + scale) + shift          (norm_modulate)
//
// post_norm is RMS or the identity, norm is RMS or Layer. h is computed from out as it is stored, rounded: the pair
// gives the bits of the two ops apart, and the statistics that are saved are those of the rows that the backward
// reads. (Statistics of the unrounded sum would not be: where a row varies little, the difference, a rounding error
// times rstd, is as large as the gradient.) With dh and dout the incoming gradients, ohat = norm(out), m = pre_weight *
// (1 + scale), zhat = post_norm(z), a = act(gate):
//   t  = dout + dnorm(dh * m)            the whole gradient that reaches the residual stream
//   dx = t                               dz = dpost_norm(t * a * post_weight)
//   A = sum_l dh * ohat, S = sum_l dh    give dscale, dpre_weight, dshift     as in norm_modulate
//   G = sum_l t * zhat                   gives dgate, dpost_weight            as in gated_residual
//
// Modulation is either per sample or per token; scale, shift and gate each say so by their token_stride in the
// forward, and by *_per_token in the backward.
//
// Bytes, U = one activation tensor: forward 4U, backward 6U.
#pragma once

#include "views.h"

namespace twostep {

struct GatedResidualNormModulateForward {
  Dtype dtype;        // of x, z, out and h
  Dtype param_dtype;  // of every parameter: dtype, or f32 where dtype is bf16 or f16
  Norm post_norm;     // rms or none
  Norm norm;          // rms or layer
  GateAct gate_act;
  double eps;
  int64_t batch, length, width;
  ConstRows x, z;
  ConstRows gate;           // absent, per sample or per token
  const void* post_weight;  // [width] or null
  const void* pre_weight;   // [width] or null
  ConstRows scale, shift;   // each absent, per sample or per token
  void* out;                // [batch, length, width], contiguous
  void* h;                  // [batch, length, width], contiguous
  void* post_rstd;          // [batch, length], accumulation type; null where post_norm is none
  void* mean;               // [batch, length], accumulation type; null for rms
  void* rstd;               // [batch, length], accumulation type
};

struct GatedResidualNormModulateBackward {
  Dtype dtype;
  Dtype param_dtype;
  Norm post_norm;
  Norm norm;
  GateAct gate_act;
  int64_t batch, length, width;
  bool gate_per_token, scale_per_token;
  ConstRows dout;  // absent (null) where nothing but h was used
  ConstRows dh;
  ConstRows out, z;
  ConstRows gate;
  const void* post_weight;
  const void* pre_weight;
  ConstRows scale;
  const void* post_rstd;  // null where post_norm is none
  const void* mean;       // null for rms
  const void* rstd;
  void* dx;            // [batch, length, width], contiguous
  void* dz;            // [batch, length, width], contiguous
  void* dgate;         // [batch, width] or [batch, length, width]; null where not wanted
  void* dpost_weight;  // [width]; null where not wanted
  void* dpre_weight;   // [width]; null where not wanted
  void* dscale;        // [batch, width] or [batch, length, width]; null where not wanted
  void* dshift;        // [batch, width] (a per-sample shift); null where not wanted or per token
  // [3][batch, splits, width]: A, S, G. Each is written where a gradient that it gives is wanted; a per-token
  // dscale makes A accumulate dh * ohat * (1 + scale), a per-token dgate makes G accumulate t * zhat * a, both
  // for the weights alone. Null where none is wanted.
  Partials partials;
};

}  // namespace twostep
