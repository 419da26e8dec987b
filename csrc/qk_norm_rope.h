// qk_norm_rope: RMSNorm of each head of q and of k, then rotary embedding of interleaved pairs.
//
//   n = x * rstd * weight                    rstd = 1 / sqrt(mean_d(x^2) + eps), over one head
//   y[2i]     = n[2i] * cos_i - n[2i + 1] * sin_i
//   y[2i + 1] = n[2i] * sin_i + n[2i + 1] * cos_i
// Backward: dn is dy rotated back (sin negated), g = dn * weight, xhat = x * rstd,
//   dx = rstd * (g - xhat * mean(g * xhat))        dweight = sum over batch, tokens and heads of dn * xhat
// rstd is recomputed in the backward: a head is already in registers there, and nothing extra is saved.
// q and k may differ in their number of heads.
//
// Bytes, U = one of q, k: forward 4U, backward 6U, + the table.
#pragma once

#include "views.h"

namespace twostep {

struct QkNormRopeForward {
  Dtype dtype;        // of q, k and the outputs
  Dtype param_dtype;  // of both weights: dtype, or f32 where dtype is bf16 or f16
  double eps;
  int64_t batch, length, width;  // width of a head, even
  ConstHeads q, k;
  const void* q_weight;  // [width] or null
  const void* k_weight;  // [width] or null
  ConstRows freqs;       // [batch or 1, length, width] of accumulation type: (cos, sin) of each pair, interleaved
  void* q_out;           // [batch, length, q.heads, width], contiguous
  void* k_out;           // [batch, length, k.heads, width], contiguous
};

struct QkNormRopeBackward {
  Dtype dtype;
  Dtype param_dtype;
  double eps;
  int64_t batch, length, width;
  ConstHeads dq_out, dk_out;  // incoming gradients
  ConstHeads q, k;
  const void* q_weight;
  const void* k_weight;
  ConstRows freqs;
  void* dq;         // [batch, length, q.heads, width], contiguous
  void* dk;         // [batch, length, k.heads, width], contiguous
  void* dq_weight;  // [width] or null where not wanted
  void* dk_weight;  // [width] or null where not wanted
  // [2][batch, splits, width]: the sums of dn * xhat over the run's tokens and heads, for q and for k.
  // Null where neither is wanted.
  Partials partials;
};

}  // namespace twostep
