// The CPU kernels' entry points. Each kernel file is compiled once per instruction set, into its own namespace;
// table() holds the set chosen for this processor at load (or by select_isa, for tests and benchmarks).
#pragma once

#include "../dmd_direction.h"
#include "../euler_step.h"
#include "../gated_residual.h"
#include "../gated_residual_norm_modulate.h"
#include "../gradient_norms.h"
#include "../norm_modulate.h"
#include "../qk_norm_rope.h"
#include "../rope.h"
#include "../swiglu.h"
#include "../two_step_split.h"

namespace twostep::cpu {

struct Kernels {
  const char* isa;  // "avx512", "avx2" or "portable"
  void (*norm_modulate_forward)(const NormModulateForward&);
  void (*norm_modulate_backward)(const NormModulateBackward&);
  void (*gated_residual_forward)(const GatedResidualForward&);
  void (*gated_residual_backward)(const GatedResidualBackward&);
  void (*gated_residual_norm_modulate_forward)(const GatedResidualNormModulateForward&);
  void (*gated_residual_norm_modulate_backward)(const GatedResidualNormModulateBackward&);
  void (*qk_norm_rope_forward)(const QkNormRopeForward&);
  void (*qk_norm_rope_backward)(const QkNormRopeBackward&);
  void (*rope)(const Rope&);
  void (*swiglu_forward)(const SwigluForward&);
  void (*swiglu_backward)(const SwigluBackward&);
  void (*euler_step_forward)(const EulerStepForward&);
  void (*euler_step_backward)(const EulerStepBackward&);
  void (*two_step_split_forward)(const TwoStepSplitForward&);
  void (*two_step_split_backward)(const TwoStepSplitBackward&);
  void (*gradient_norms)(const GradientNorms&);
  void (*dmd_direction)(const DmdDirection&);
};

const Kernels& table();

// True where this processor and this build have the instruction set; table() then returns it.
bool select_isa(const char* isa);

// How many runs a sample's rows are cut into in a backward, from the shape alone: never from the thread count.
int64_t splits(int64_t batch, int64_t length, int64_t width);

// Threads come from outside, so that the kernels run in torch's own pool. Runs body(first, last, context) over
// disjoint ranges that cover [begin, end). The default runs it all in the calling thread.
using Body = void (*)(int64_t first, int64_t last, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
void set_parallel_for(ParallelFor run);

}  // namespace twostep::cpu
