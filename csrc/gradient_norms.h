// gradient_norms: the L2 norm of each sample of a gradient, and of all of it
//
//   norm_b = sqrt(sum_i g_bi^2)          total = sqrt(sum_b norm_b^2)
// They stay on the device: a clip factor made of them, min(1, limit / total), costs no synchronisation. No gradient.
//
// Squares are added up as views.h says of sample_piece: float32 within a piece, double across pieces.
//
// Bytes, G = the gradient: 1G.
#pragma once

#include "views.h"

namespace twostep {

struct GradientNorms {
  Dtype dtype;
  int64_t batch, size;
  ConstSamples g;
  void* partials;  // [batch, ceil(size / sample_piece)] of the accumulation type
  void* norms;     // [batch] of the accumulation type
  void* total;     // one number of the accumulation type
};

}  // namespace twostep
