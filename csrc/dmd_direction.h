// dmd_direction: the gradient of distribution matching distillation, normalised per sample
// (DMD2, arXiv 2405.14867, as its released code has it)
//
//   p_real = x - real, p_fake = x - fake          direction = (p_real - p_fake) / mean |p_real|
//                                                           = (fake - real) / max(mean |x - real|, eps)
// The form below subtracts once instead of three times: x cancels, and its rounding with it. The mean is over a sample,
// added up as views.h says of sample_piece; where it is not finite, all of the sample's direction is NaN. Data, not a
// function to differentiate: a loss puts it in the place of a gradient.
//
// Bytes, X = the state, P = one of the predictions: X + 2P + the direction, where real is still in cache when it is
// read the second time: on the CPU a few samples are finished before the next are begun, a GPU's second-level cache
// holds the latents of a batch (16 MB for 16 images of 1024 x 1024 pixels).
#pragma once

#include "views.h"

namespace twostep {

struct DmdDirection {
  Dtype dtype;             // of x
  Dtype prediction_dtype;  // of real and fake: dtype, or bf16 or f16 where dtype is f32
  int64_t batch, size;
  double eps;
  ConstSamples x, real, fake;
  void* partials;   // [batch, ceil(size / sample_piece)] of the accumulation type
  void* scales;     // [batch] of the accumulation type: 1 / max(mean, eps)
  void* direction;  // [batch, size] of the accumulation type, contiguous
};

}  // namespace twostep
