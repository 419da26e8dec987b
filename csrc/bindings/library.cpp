// The library: its operators, registered once for each kind of device, and the threads that its CPU kernels use.
#include "bindings/operators.h"

namespace twostep::bindings {
namespace {

void torch_parallel_for_adapter(int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { body(first, last, context); });
}

void implement(Library& m) {
  implement_blocks(m);
  implement_steps(m);
}

}  // namespace
}  // namespace twostep::bindings

STABLE_TORCH_LIBRARY(twostep, m) {
  twostep::cpu::set_parallel_for(twostep::bindings::torch_parallel_for_adapter);
  twostep::bindings::define_blocks(m);
  twostep::bindings::define_steps(m);
}

STABLE_TORCH_LIBRARY_IMPL(twostep, CPU, m) {
  twostep::bindings::implement(m);
  twostep::bindings::implement_blocks_on_cpu(m);
}
#ifdef TWOSTEP_CUDA
STABLE_TORCH_LIBRARY_IMPL(twostep, CUDA, m) { twostep::bindings::implement(m); }
#endif

// For tests and benchmarks, through ctypes: which instruction set the CPU kernels use, and choosing another.
extern "C" __attribute__((visibility("default"))) const char* twostep_cpu_isa() { return twostep::cpu::table().isa; }
extern "C" __attribute__((visibility("default"))) bool twostep_select_cpu_isa(const char* isa) {
  return twostep::cpu::select_isa(isa);
}
