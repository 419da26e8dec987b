// rope: rotary embedding of interleaved pairs, by a table of (cos, sin).
//
//   y[2i] = x[2i] * cos_i - x[2i + 1] * sin_i        y[2i + 1] = x[2i] * sin_i + x[2i + 1] * cos_i
// The backward is the same with sin negated (inverse = true).
//
// Bytes, U = x: 2U either way, + the table.
#pragma once

#include "views.h"

namespace twostep {

struct Rope {
  Dtype dtype;
  bool inverse;
  int64_t batch, length, width;  // width of a head, even
  ConstHeads x;
  ConstRows freqs;  // [batch or 1, length, width] of accumulation type: (cos, sin) of each pair, interleaved
  void* y;          // [batch, length, x.heads, width], contiguous
};

}  // namespace twostep
