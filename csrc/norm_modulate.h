// norm_modulate: y = norm(x) * weight * (1 + scale) + shift
//
// norm is RMS (x * rstd, rstd = 1 / sqrt(mean(x^2) + eps)) or Layer ((x - mean) * rstd). weight, scale and
// shift may be absent. With xhat = norm(x), m = weight * (1 + scale), g = dy * m:
//   dx     = rstd * (g - xhat * mean(g * xhat))                     RMS
//   dx     = rstd * (g - mean(g) - xhat * mean(g * xhat))           Layer
//   dshift = sum_l dy    dscale = weight * sum_l dy * xhat    dweight = sum_b (1 + scale) * sum_l dy * xhat
// so two accumulators a sample, A = sum_l dy * xhat and S = sum_l dy, give all three. With modulation per
// token, dscale[b, l] = dy * xhat * weight is written directly, dshift is dy itself (the caller returns it),
// and A accumulates dy * xhat * (1 + scale) for dweight.
//
// Bytes, U = one activation tensor: forward 2U, backward 3U (+ 1U each way for a per-token scale or shift).
#pragma once

#include "views.h"

namespace twostep {

struct NormModulateForward {
  Dtype dtype;        // of x and y
  Dtype param_dtype;  // of weight, scale and shift: dtype, or f32 where dtype is bf16 or f16
  Norm norm;          // rms or layer
  double eps;
  int64_t batch, length, width;
  ConstRows x;
  const void* weight;      // [width] or null
  ConstRows scale, shift;  // each absent, per sample (token_stride 0) or per token
  void* y;                 // [batch, length, width], contiguous
  void* mean;              // [batch, length], accumulation type; null for rms
  void* rstd;              // [batch, length], accumulation type
};

struct NormModulateBackward {
  Dtype dtype;        // of dy, x and dx
  Dtype param_dtype;  // of weight, scale and their gradients, and of dshift
  Norm norm;
  int64_t batch, length, width;
  bool scale_per_token;  // decides the shape of dscale
  ConstRows dy, x;
  const void* weight;  // [width] or null
  ConstRows scale;     // absent, per sample or per token
  const void* mean;    // null for rms
  const void* rstd;
  void* dx;       // [batch, length, width], contiguous
  void* dweight;  // [width], or null where not wanted
  void* dscale;   // [batch, width], or [batch, length, width] where scale_per_token; null where not wanted
  void* dshift;   // [batch, width] (a per-sample shift); null where not wanted or per token
  // [2][batch, splits, width]: A, then S. A is written where dweight or a per-sample dscale is wanted, S where
  // dshift is. Null where none of the three is.
  Partials partials;
};

}  // namespace twostep
