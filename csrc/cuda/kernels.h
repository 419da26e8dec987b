// The CUDA launchers. Torch-free: parameters by value, a stream, the launch's error code back. Pointers are
// device pointers on the stream's device. Nothing here synchronises, allocates or queries more than attributes
// of the current device, so every launcher may be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

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

namespace twostep::cuda {

cudaError_t norm_modulate_forward(const NormModulateForward&, cudaStream_t);
cudaError_t norm_modulate_backward(const NormModulateBackward&, cudaStream_t);
cudaError_t gated_residual_forward(const GatedResidualForward&, cudaStream_t);
cudaError_t gated_residual_backward(const GatedResidualBackward&, cudaStream_t);
cudaError_t gated_residual_norm_modulate_forward(const GatedResidualNormModulateForward&, cudaStream_t);
cudaError_t gated_residual_norm_modulate_backward(const GatedResidualNormModulateBackward&, cudaStream_t);
cudaError_t qk_norm_rope_forward(const QkNormRopeForward&, cudaStream_t);
cudaError_t qk_norm_rope_backward(const QkNormRopeBackward&, cudaStream_t);
cudaError_t rope(const Rope&, cudaStream_t);
cudaError_t swiglu_forward(const SwigluForward&, cudaStream_t);
cudaError_t swiglu_backward(const SwigluBackward&, cudaStream_t);
cudaError_t euler_step_forward(const EulerStepForward&, cudaStream_t);
cudaError_t euler_step_backward(const EulerStepBackward&, cudaStream_t);
cudaError_t two_step_split_forward(const TwoStepSplitForward&, cudaStream_t);
cudaError_t two_step_split_backward(const TwoStepSplitBackward&, cudaStream_t);
cudaError_t gradient_norms(const GradientNorms&, cudaStream_t);
cudaError_t dmd_direction(const DmdDirection&, cudaStream_t);

// How many runs a sample's rows are cut into in a backward on the current device: a small multiple of its
// multiprocessors in all, at least one a sample. Fixed by the shape and the device.
int64_t splits(int64_t batch, int64_t length, int64_t width);

// Limits of the kernels; the caller falls back to the reference past them.
constexpr int64_t max_width = 16384;
constexpr int64_t max_head_width = 1024;

}  // namespace twostep::cuda
