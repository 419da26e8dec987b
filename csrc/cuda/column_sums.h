// The second stage of a backward: partial sums of runs, added in a fixed order, become gradients of parameters.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "../views.h"

namespace twostep::cuda {

// One of the sums in partials and what it gives, A being its total for a sample:
//   per_sample[b] = A * act'(modulation[b]) * weight
//   per_width     = sum_b A * act(modulation[b])
// act is 1 + x for a scale, tanh or the identity for a gate; where there is no modulation, act and act' are 1.
// With modulation per token A already contains act(modulation), and the modulation is left out here.
struct ColumnGradients {
  enum class Kind : int { none, scale, gate, tanh_gate } kind;
  ConstRows modulation;
  const void* weight;
  void* per_sample;  // [batch, width] or null
  void* per_width;   // [width] or null
};

inline ColumnGradients scale_gradients(const ConstRows& scale, bool per_token, const void* weight, void* dscale,
                                       void* dweight) {
  const bool modulated = scale.data != nullptr && !per_token;
  const auto kind = modulated ? ColumnGradients::Kind::scale : ColumnGradients::Kind::none;
  return {kind, scale, weight, per_token ? nullptr : dscale, dweight};
}

inline ColumnGradients gate_gradients(const ConstRows& gate, GateAct act, bool per_token, const void* weight,
                                      void* dgate, void* dweight) {
  const bool modulated = gate.data != nullptr && !per_token;
  const auto kind = !modulated             ? ColumnGradients::Kind::none
                    : act == GateAct::tanh ? ColumnGradients::Kind::tanh_gate
                                           : ColumnGradients::Kind::gate;
  return {kind, gate, weight, per_token ? nullptr : dgate, dweight};
}

inline ColumnGradients plain_gradients(void* per_sample, void* per_width) {
  return {ColumnGradients::Kind::none, {}, nullptr, per_sample, per_width};
}

// partials holds [gradients.size()][batch, splits, width] floats; where there is a per_width and more than one sample,
// the first split of each sample is overwritten. At most three sums.
cudaError_t sum_columns(Dtype param_dtype, int64_t batch, int64_t width, const Partials& partials,
                        std::initializer_list<ColumnGradients> gradients, cudaStream_t stream);

}  // namespace twostep::cuda
