// What the operators as PyTorch sees them share: the checks of a call, its outputs, and the way to a kernel.
//
// This folder is all that knows PyTorch. It is written against LibTorch's stable ABI, so that one binary serves every
// PyTorch from the targeted version on, CPU-only or CUDA. Each operator is functional (but swiglu_over_gate): it
// allocates its outputs, fills a parameter struct and hands it to the kernel of the tensor's device. Autograd,
// broadcasting and friendly errors live in twostep/ops; the checks here keep a direct call of torch.ops.twostep.*, with
// tensors of one device, from reading memory that is not there.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#ifdef TWOSTEP_CUDA
#include "cuda/kernels.h"
// Weak: absent in a CPU-only PyTorch, into which this very binary may be loaded too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace twostep::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: break;
  }
  STD_TORCH_CHECK(false, "twostep: dtype ", torch::headeronly::toString(type),
                  " is not supported; accepted: float32, bfloat16, float16, float64");
}

inline ScalarType accumulation_of(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// What all operators share: the first tensor, which decides device and dtype, and the shape of its rows.
struct Call {
  const char* name;
  const Tensor& x;
  ScalarType type;
  int64_t batch, length, width;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;

  Call(const char* op, const Tensor& first, int64_t rank) : name(op), x(first), type(first.scalar_type()) {
    STD_TORCH_CHECK(x.dim() == rank, name, ": the first tensor has ", x.dim(), " dimensions, expected ", rank);
    batch = x.size(0), length = x.size(1), width = x.size(rank - 1);
    if (x.is_cuda()) guard.emplace(x.get_device_index());
  }

  // For samples: batch and width, which is the size of one, whatever dimensions it has.
  Call(const char* op, const Tensor& first) : name(op), x(first), type(first.scalar_type()), batch(0), length(1) {
    STD_TORCH_CHECK(x.dim() > 0, name, ": the first tensor has no dimension, expected [batch, ...]");
    const auto sizes = x.sizes();
    batch = sizes[0], width = 1;
    for (size_t d = 1; d < sizes.size(); ++d) width *= sizes[d];
    if (x.is_cuda()) guard.emplace(x.get_device_index());
  }

  Dtype dtype() const { return dtype_of(type); }
  ScalarType accumulation() const { return accumulation_of(type); }

  template <class Sizes>
  Tensor empty_of(const Sizes& shape, ScalarType element) const {
    std::array<int64_t, 64> sizes, strides;  // as many dimensions as a tensor can have
    int64_t rank = 0, stride = 1;
    for (int64_t size : shape) sizes[rank++] = size;
    for (int64_t d = rank - 1; d >= 0; --d) strides[d] = stride, stride *= sizes[d] > 1 ? sizes[d] : 1;
    int32_t device_type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        rank, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(element)),
        device_type, x.get_device_index(), &handle));
    return Tensor(handle);
  }
  Tensor empty(std::initializer_list<int64_t> shape, ScalarType element) const { return empty_of(shape, element); }
  Tensor empty_samples(ScalarType element) const { return empty_of(x.sizes(), element); }
  Tensor empty_rows() const { return empty({batch, length, width}, type); }
  Tensor empty_like(const Tensor& t) const {
    return t.dim() == 2 ? empty({t.size(0), t.size(1)}, t.scalar_type())
                        : empty({t.size(0), t.size(1), t.size(2)}, t.scalar_type());
  }
  Tensor none(ScalarType element) const { return empty({0}, element); }
  Tensor statistics(bool wanted) const {
    return wanted ? empty({batch, length}, accumulation()) : none(accumulation());
  }

  void same_device(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.device() == x.device(), name, ": ", what, " is on another device than the first tensor");
  }
  void same_type(const Tensor& t, const char* what) const {
    same_device(t, what);
    STD_TORCH_CHECK(t.scalar_type() == type, name, ": ", what, " has another dtype than the first tensor");
  }

  // The tensor itself where its last dimension is dense, else a dense copy.
  Tensor dense(const Tensor& t) const {
    return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
  }

  Tensor rows_tensor(const Tensor& t, const char* what) const {
    same_type(t, what);
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == batch && t.size(1) == length && t.size(2) == width, name, ": ", what,
                    " must have the first tensor's shape");
    return dense(t);
  }
  void check_statistics(const Tensor& t, bool wanted, const char* what) const {
    same_device(t, what);
    STD_TORCH_CHECK(!wanted || (t.dim() == 2 && t.size(0) == batch && t.size(1) == length && t.is_contiguous() &&
                                t.scalar_type() == accumulation()),
                    name, ": ", what, " must be [batch, length], contiguous, of the accumulation dtype");
  }
};

inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline void* out(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

#ifdef TWOSTEP_CUDA
template <class Params>
void run_cuda(const Call& call, cudaError_t (*kernel)(const Params&, cudaStream_t), const Params& params) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, call.name, ": this PyTorch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(call.x.get_device_index(), &stream));
  const cudaError_t error = kernel(params, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice, call.name,
                  ": the binary holds no kernel for this GPU's architecture; `twostep doctor` prints both, "
                  "and TORCH_CUDA_ARCH_LIST=<capability> pip install -e . builds for it");
  STD_TORCH_CHECK(error == cudaSuccess, call.name, ": CUDA error ", cudaGetErrorName(error), ": ",
                  cudaGetErrorString(error));
}
#define TWOSTEP_RUN(call, kernel, params) \
  ((call).x.is_cuda() ? run_cuda((call), &cuda::kernel, (params)) : cpu::table().kernel(params))
#else
#define TWOSTEP_RUN(call, kernel, params) cpu::table().kernel(params)
#endif

using Library = torch::stable::detail::StableLibrary;

// blocks.cpp: the operators on rows and heads, which transformer blocks are made of.
void define_blocks(Library& m);
void implement_blocks(Library& m);
void implement_blocks_on_cpu(Library& m);  // what there is on the CPU alone

// steps.cpp: the operators on samples, which sampling steps are made of.
void define_steps(Library& m);
void implement_steps(Library& m);

}  // namespace twostep::bindings
