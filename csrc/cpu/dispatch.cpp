// Chooses, once and at run time, which build of the kernels this processor gets; holds the thread pool's entry.
#include "kernels.h"
#include "parallel.h"

#include <cstring>

#if defined(__x86_64__)
#define TWOSTEP_HAS_X86_SETS 1
#else
#define TWOSTEP_HAS_X86_SETS 0
#endif

namespace twostep::cpu {

#define TWOSTEP_DECLARE(isa)                                                            \
  namespace isa {                                                                       \
  void norm_modulate_forward(const NormModulateForward&);                               \
  void norm_modulate_backward(const NormModulateBackward&);                             \
  void gated_residual_forward(const GatedResidualForward&);                             \
  void gated_residual_backward(const GatedResidualBackward&);                           \
  void gated_residual_norm_modulate_forward(const GatedResidualNormModulateForward&);   \
  void gated_residual_norm_modulate_backward(const GatedResidualNormModulateBackward&); \
  void qk_norm_rope_forward(const QkNormRopeForward&);                                  \
  void qk_norm_rope_backward(const QkNormRopeBackward&);                                \
  void rope(const Rope&);                                                               \
  void swiglu_forward(const SwigluForward&);                                            \
  void swiglu_backward(const SwigluBackward&);                                          \
  void euler_step_forward(const EulerStepForward&);                                     \
  void euler_step_backward(const EulerStepBackward&);                                   \
  void two_step_split_forward(const TwoStepSplitForward&);                              \
  void two_step_split_backward(const TwoStepSplitBackward&);                            \
  void gradient_norms(const GradientNorms&);                                            \
  void dmd_direction(const DmdDirection&);                                              \
  const Kernels kernels = {#isa,                                                        \
                           norm_modulate_forward,                                       \
                           norm_modulate_backward,                                      \
                           gated_residual_forward,                                      \
                           gated_residual_backward,                                     \
                           gated_residual_norm_modulate_forward,                        \
                           gated_residual_norm_modulate_backward,                       \
                           qk_norm_rope_forward,                                        \
                           qk_norm_rope_backward,                                       \
                           rope,                                                        \
                           swiglu_forward,                                              \
                           swiglu_backward,                                             \
                           euler_step_forward,                                          \
                           euler_step_backward,                                         \
                           two_step_split_forward,                                      \
                           two_step_split_backward,                                     \
                           gradient_norms,                                              \
                           dmd_direction};                                              \
  }

TWOSTEP_DECLARE(portable)
#if TWOSTEP_HAS_X86_SETS
TWOSTEP_DECLARE(avx2)
TWOSTEP_DECLARE(avx512)
#endif

namespace {

bool runs_here(const Kernels& kernels) {
#if TWOSTEP_HAS_X86_SETS
  if (&kernels == &avx512::kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs_here(avx2::kernels);
  }
  if (&kernels == &avx2::kernels) {
    // Neither GCC 12 nor older clang knows the name "f16c"; every processor with AVX2 and FMA has it.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return &kernels == &portable::kernels;
}

// Best first.
const Kernels* const kSets[] = {
#if TWOSTEP_HAS_X86_SETS
    &avx512::kernels, &avx2::kernels,
#endif
    &portable::kernels};

const Kernels* best() {
  for (const Kernels* set : kSets) {
    if (runs_here(*set)) return set;
  }
  return &portable::kernels;
}

const Kernels*& chosen() {
  static const Kernels* kernels = best();
  return kernels;
}

void run_serially(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  if (begin < end) body(begin, end, context);
}

ParallelFor parallel_for_function = run_serially;

}  // namespace

const Kernels& table() { return *chosen(); }

bool select_isa(const char* isa) {
  for (const Kernels* set : kSets) {
    if (std::strcmp(set->isa, isa) == 0 && runs_here(*set)) {
      chosen() = set;
      return true;
    }
  }
  return false;
}

int64_t splits(int64_t batch, int64_t length, int64_t width) {
  (void)width;
  // Runs of at least 32 rows: a run writes two or three fp32 rows of sums and the second stage reads them back, so
  // at 32 bf16 rows this adds at most 2 * 4 * 2 / (32 * 3 * 2) = 8 % to the bytes of norm_modulate's backward, and
  // from cache. At most 256 runs in all, four for each of 64 cores, unless a run would then add up more than 128 rows
  // one by one: rounding grows with the run (65536 rows in 256 runs: 7 times eager PyTorch's error in float32).
  const int64_t by_rows = length / 32;
  const int64_t enough = 256 / (batch > 0 ? batch : 1), exact = length / 128;
  const int64_t by_total = enough > exact ? enough : exact;
  const int64_t n = by_rows < by_total ? by_rows : by_total;
  return n > 1 ? n : 1;
}

void set_parallel_for(ParallelFor run) { parallel_for_function = run ? run : run_serially; }

void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  parallel_for_function(begin, end, grain, body, context);
}

}  // namespace twostep::cpu
