// From a problem's shape to a grid. Every number that decides a launch shape stands here, with its reason.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>

#include "device.h"
#include "rows.cuh"

namespace twostep::cuda {

// A block of small teams: 256 threads spread well over a multiprocessor and leave little idle at the end.
constexpr int small_block = 256;
// Rows of a run at least. Forward: the modulation, read once a run, is 4 to 8 bytes a column against 2 to 4 of a row.
// Backward: each run also writes and re-reads up to three fp32 sums a column, 24 bytes against a row's 12.
constexpr int min_rows_forward = 2;
constexpr int min_rows_backward = 4;
// Threads of a team that loops over its row: each has several loads in flight, and a sum crosses 8 warps at most.
constexpr int looping_team = 256;
// Blocks of a grid at most (in x; the other directions allow 65535).
constexpr int64_t max_blocks = (int64_t(1) << 31) - 1;

#ifdef TWOSTEP_SIMT
constexpr bool devices_change = true;  // tests set the multiprocessor count
#else
constexpr bool devices_change = false;
#endif

// Shared memory from which on a kernel is one that keeps rows there.
constexpr int staging_bytes = 4096;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for a row of so many vectors: a power of two within a warp, else whole warps.
inline int team_size(int64_t vectors, int limit) {
  if (vectors <= 32) {
    int size = 1;
    while (size < vectors) size *= 2;
    return size;
  }
  return int(std::min<int64_t>(ceil_div(vectors, 32) * 32, limit));
}

inline int64_t runs_per_sample(const Device& device, int64_t batch, int64_t length, int teams_resident, int min_rows) {
  if (batch <= 0 || length <= 0) return 1;
  const int64_t teams = int64_t(device.multiprocessors) * teams_resident;
  const int64_t most = std::clamp<int64_t>(teams / batch, 1, ceil_div(length, min_rows));
  return ceil_div(length, ceil_div(length, most));  // no empty runs
}

struct Grid {
  int64_t blocks;
  dim3 block;
  int shared;
};

// Opts in to the shared memory once a kernel and device, launches, reports. The caller's arguments are the kernel's.
template <auto Kernel, class... Arguments>
cudaError_t launch(const Grid& grid, [[maybe_unused]] cudaStream_t stream, const Arguments&... arguments) {
  static std::atomic<uint64_t> opted_in{0};
  if (grid.blocks > max_blocks) return cudaErrorInvalidConfiguration;
  int ordinal = 0;
  Device device;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) error = current_device(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = ordinal < 64 ? uint64_t(1) << ordinal : 0;
  if (grid.shared > staging_bytes && (opted_in.load(std::memory_order_relaxed) & bit) == 0) {
    const void* kernel = reinterpret_cast<const void*>(Kernel);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    // Or the split between cache and shared memory may leave room for fewer blocks than the plan counts on.
    if (error == cudaSuccess) {
      error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) return error;
    opted_in.fetch_or(bit, std::memory_order_relaxed);
  }
#ifdef TWOSTEP_SIMT
  simt::run(unsigned(grid.blocks), grid.block, grid.shared, [&] { Kernel(arguments...); });
#else
  Kernel<<<unsigned(grid.blocks), grid.block, grid.shared, stream>>>(arguments...);
#endif
  return cudaGetLastError();
}

template <class F>
cudaError_t with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(__nv_bfloat16{});
    case Dtype::f16: return f(__half{});
    default: return cudaErrorNotSupported;
  }
}

inline bool parameters_fit(Dtype dtype, Dtype parameters) { return parameters == dtype || parameters == Dtype::f32; }
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Whether every row of a launch starts on 16 bytes. Absent tensors do.
class Alignment {
 public:
  explicit Alignment(Dtype parameters) : parameter_bytes_(bytes_of(parameters)) {}
  Alignment& pointer(const void* data) {
    aligned_ &= reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return *this;
  }
  template <class Pointer>
  Alignment& rows(const RowsOf<Pointer>& x, int64_t bytes) {
    if (x.data == nullptr) return *this;
    aligned_ &= x.batch_stride * bytes % 16 == 0 && x.token_stride * bytes % 16 == 0;
    return pointer(x.data);
  }
  template <class Pointer>
  Alignment& heads(const HeadsOf<Pointer>& x, int64_t bytes) {
    aligned_ &= x.head_stride * bytes % 16 == 0;
    return rows(RowsOf<Pointer>{x.data, x.batch_stride, x.token_stride}, bytes);
  }
  Alignment& parameter(const ConstRows& x) { return rows(x, parameter_bytes_); }
  explicit operator bool() const { return aligned_; }

 private:
  int64_t parameter_bytes_;
  bool aligned_ = true;
};

// Gradients of parameters where there is nothing to add up.
inline cudaError_t zero(std::initializer_list<void*> gradients, std::initializer_list<int64_t> bytes,
                        cudaStream_t stream) {
  auto size = bytes.begin();
  for (void* gradient : gradients) {
    const int64_t count = *size++;
    if (gradient == nullptr || count <= 0) continue;
    const cudaError_t error = cudaMemsetAsync(gradient, 0, size_t(count), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// What the three row ops ask for.
struct RowProblem {
  int64_t batch, length, width;
  bool aligned;
  int tensors;  // inputs that arrive row by row
  int factors;  // floats a column that shared memory holds
  Budget budget;
  int min_rows;
  int64_t runs;          // 0: as many as fill the device
  bool looping = false;  // whatever the width
};

struct RowLaunch {
  RowPlan plan;
  Grid grid;
};

// How many rows to copy ahead: what so many blocks on a multiprocessor can hold, at most max_copies_ahead; -1 where
// not even the row at hand fits.
inline int rows_ahead(const Device& device, int blocks, int64_t fixed_bytes, int64_t row_bytes) {
  const int64_t share = std::min(device.shared_per_multiprocessor / blocks - 1024, device.shared_per_block);
  const int64_t rows = std::max<int64_t>(share - fixed_bytes, 0) / row_bytes;
  return int(std::min<int64_t>(rows, max_copies_ahead + 1)) - 1;
}

// vectors: of 16 bytes, a thread and tensor, that shared memory holds of a row; 0 for kernels that loop over a row.
inline RowLaunch plan_rows(const Device& device, const RowProblem& problem, int team, int vectors) {
  const int teams = team <= 32 ? small_block / team : 1, threads = team * teams;
  const int64_t row_bytes = int64_t(16) * vectors * problem.tensors * threads;
  const int64_t column_bytes = vectors == 0 ? 0 : int64_t(4) * elements_per_thread * problem.factors * threads;
  const int64_t fixed_bytes = TeamSum::bytes + column_bytes;
  // As many blocks as the registers allow; fewer where shared memory could not hold a row ahead for each. Two blocks
  // with one row of 4 x 3840 bf16 ahead keep 60 KB in flight, twice what hides the latency of an H200's memory
  // (29 KB: 4.8 TB/s over 132 multiprocessors times 800 ns).
  int blocks = std::max(problem.budget.resident / threads, 1);
  RowLaunch launch;
  launch.plan.ahead = 0;
  if (vectors > 0) {
    while (blocks > 1 && rows_ahead(device, blocks, fixed_bytes, row_bytes) < 1) --blocks;
    launch.plan.ahead = rows_ahead(device, blocks, fixed_bytes, row_bytes);
  }
  launch.plan.runs = problem.runs > 0
                         ? problem.runs
                         : runs_per_sample(device, problem.batch, problem.length, blocks * teams, problem.min_rows);
  launch.plan.rows = ceil_div(problem.length, launch.plan.runs);
  launch.grid.blocks = ceil_div(problem.batch * launch.plan.runs, teams);
  launch.grid.block = dim3(team, teams);
  launch.grid.shared = int(fixed_bytes + (launch.plan.ahead + 1) * row_bytes);
  return launch;
}

// Picks the kernel: f(T, vector width, vectors a thread) names it, as std::integral_constants, and launches it.
template <class F>
cudaError_t launch_rows(Dtype dtype, const RowProblem& problem, F&& f) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int W = wide_vector<T>, V = elements_per_thread / W;
    const int64_t vectors = ceil_div(problem.width, W);
    const bool aligned = problem.aligned && problem.width % W == 0;
    const int limit = problem.budget.max_threads;
    if (aligned && !problem.looping && vectors <= int64_t(limit) * V) {
      const RowLaunch launch = plan_rows(device, problem, team_size(ceil_div(vectors, V), limit), V);
      if (launch.plan.ahead >= 0) {
        return f(element, std::integral_constant<int, W>{}, std::integral_constant<int, V>{}, launch);
      }
    }
    if (aligned) {
      const RowLaunch launch = plan_rows(device, problem, team_size(vectors, looping_team), 0);
      return f(element, std::integral_constant<int, W>{}, std::integral_constant<int, 0>{}, launch);
    }
    const RowLaunch launch = plan_rows(device, problem, team_size(problem.width, looping_team), 0);
    return f(element, std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{}, launch);
  });
}

}  // namespace twostep::cuda
