// The factors that multiply a normalised row, and their derivatives.
//   scale: m = weight * (1 + scale)      gate: c = act(gate) * weight
#pragma once

#include "vectors.cuh"

namespace twostep::cuda {

struct Scale {
  static __device__ float apply(float x, bool) { return 1.f + x; }
  static __device__ float derivative(float, bool) { return 1.f; }
};

// flag: through tanh.
struct Gate {
  static __device__ float apply(float x, bool through_tanh) { return through_tanh ? tanhf(x) : x; }
  static __device__ float derivative(float x, bool through_tanh) {
    if (!through_tanh) return 1.f;
    const float t = tanhf(x);
    return 1.f - t * t;
  }
};

__device__ inline bool per_token_rows(const ConstRows& rows) { return rows.data != nullptr && rows.token_stride != 0; }

template <int W, class T>
__device__ inline void load_shift(const ConstRows& shift, bool f32, int64_t b, int64_t l, int column, float (&out)[W]) {
  if (shift.data != nullptr) {
    load_parameter<W, T>(shift.data, f32, b * shift.batch_stride + l * shift.token_stride + column, out);
  } else {
#pragma unroll
    for (int e = 0; e < W; ++e) out[e] = 0.f;
  }
}

// A modulating parameter and the weight it comes with, either of which may be absent.
template <class Kind>
struct Factor {
  ConstRows modulation;
  const void* weight;
  bool f32;   // the parameters' dtype
  bool flag;  // of Kind

  __device__ bool present() const { return modulation.data != nullptr; }
  __device__ bool per_token() const { return per_token_rows(modulation); }

  template <int W, class T>
  __device__ void weights(int column, float (&out)[W]) const {
    if (weight != nullptr) {
      load_parameter<W, T>(weight, f32, column, out);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) out[i] = 1.f;
    }
  }

  template <int W, class T>
  __device__ void raw(int64_t b, int64_t l, int column, float (&out)[W]) const {
    const int64_t offset = b * modulation.batch_stride + l * modulation.token_stride + column;
    load_parameter<W, T>(modulation.data, f32, offset, out);
  }

  // Kind::apply(modulation) * weight
  template <int W, class T>
  __device__ void product(int64_t b, int64_t l, int column, float (&out)[W]) const {
    weights<W, T>(column, out);
    if (!present()) return;
    float x[W];
    raw<W, T>(b, l, column, x);
#pragma unroll
    for (int i = 0; i < W; ++i) out[i] *= Kind::apply(x[i], flag);
  }

  // The backward with modulation per token; the row starts at element `at`. `sums` comes in as gradient * normalised
  // row; the modulation's own gradient is written from it, and it leaves as what the weight's gradient adds up.
  template <int W, class T>
  __device__ void token_gradient(int64_t b, int64_t l, int64_t at, int column, void* gradient, float (&sums)[W]) const {
    float x[W];
    raw<W, T>(b, l, column, x);
    if (gradient != nullptr) {
      float w[W];
      weights<W, T>(column, w);
#pragma unroll
      for (int i = 0; i < W; ++i) w[i] *= sums[i] * Kind::derivative(x[i], flag);
      store_parameter<W, T>(gradient, f32, at + column, w);
    }
#pragma unroll
    for (int i = 0; i < W; ++i) sums[i] *= Kind::apply(x[i], flag);
  }
};

}  // namespace twostep::cuda
