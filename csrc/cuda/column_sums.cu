// Second stage of the backwards. Grid: (sum, sample, tile of 32 columns), flattened; a block's 16 lanes take every
// 16th run and are added up through shared memory in order, so the result depends on the shape alone. Then, where a
// weight's gradient spans several samples, the same again over samples. Reads 4 bytes a sum, column and run, which the
// first stage has just written: they come from the L2 cache.
#include "column_sums.h"

#include "launch.cuh"
#include "modulation.cuh"
#include "shared.cuh"

namespace twostep::cuda {
namespace {

constexpr int tile = 32, lanes = 16;  // 32 columns are one 128-byte line
constexpr int max_sums = 3;

struct Stage {
  ColumnGradients gradients[max_sums];
  Dtype param_dtype;
  int64_t batch, splits, width, tiles;
  float* partials;
};

// The sum of `count` floats `stride` apart, taken by the block's lanes for one column each; valid in lane 0.
__device__ float sum_strided(const float* from, int64_t count, int64_t stride, bool inside) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  float total = 0.f;
  if (inside) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < count; i += lanes) total += __ldcg(from + i * stride);
  }
  shared_store(scratch + threadIdx.y * tile + threadIdx.x, total);
  __syncthreads();
  if (threadIdx.y == 0) {
    total = 0.f;
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane) total += shared_load(scratch + lane * tile + threadIdx.x);
  }
  __syncthreads();  // before the next tile's sums overwrite these
  return total;
}

__device__ void write(const Stage& s, void* to, int64_t at, float value) {
  const float values[1] = {value};
  if (s.param_dtype == Dtype::f16) {
    store_parameter<1, __half>(to, false, at, values);
  } else {
    store_parameter<1, __nv_bfloat16>(to, s.param_dtype == Dtype::f32, at, values);
  }
}

__device__ float read(const Stage& s, const void* from, int64_t at) {
  float values[1];
  if (s.param_dtype == Dtype::f16) {
    load_parameter<1, __half>(from, false, at, values);
  } else {
    load_parameter<1, __nv_bfloat16>(from, s.param_dtype == Dtype::f32, at, values);
  }
  return values[0];
}

__global__ void __launch_bounds__(tile* lanes) sum_runs(const __grid_constant__ Stage s, const int64_t work) {
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t group = item / s.tiles, which = group / s.batch, b = group - which * s.batch;
    const int64_t column = (item - group * s.tiles) * tile + threadIdx.x;
    const bool inside = column < s.width;
    const ColumnGradients& to = s.gradients[which];
    if (to.per_sample == nullptr && to.per_width == nullptr) continue;
    float* const from = s.partials + group * s.splits * s.width + column;
    const float total = sum_strided(from, s.splits, s.width, inside);
    if (threadIdx.y != 0 || !inside) continue;
    using Kind = ColumnGradients::Kind;
    float act = 1.f, derivative = 1.f;
    if (to.kind != Kind::none) {
      const float x = read(s, to.modulation.data, b * to.modulation.batch_stride + column);
      const bool through_tanh = to.kind == Kind::tanh_gate;
      act = to.kind == Kind::scale ? Scale::apply(x, false) : Gate::apply(x, through_tanh);
      derivative = Gate::derivative(x, through_tanh);
    }
    if (to.per_sample != nullptr) {
      const float weight = to.weight == nullptr ? 1.f : read(s, to.weight, column);
      write(s, to.per_sample, b * s.width + column, total * derivative * weight);
    }
    if (to.per_width != nullptr) {
      const float term = total * act;
      if (s.batch == 1) {
        write(s, to.per_width, column, term);
      } else {
        __stwb(from, term);
      }
    }
  }
}

__global__ void __launch_bounds__(tile* lanes) sum_samples(const __grid_constant__ Stage s, const int64_t work) {
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t which = item / s.tiles, column = (item - which * s.tiles) * tile + threadIdx.x;
    const bool inside = column < s.width;
    const ColumnGradients& to = s.gradients[which];
    if (to.per_width == nullptr) continue;
    const int64_t sample = s.splits * s.width;
    const float total = sum_strided(s.partials + which * s.batch * sample + column, s.batch, sample, inside);
    if (threadIdx.y == 0 && inside) write(s, to.per_width, column, total);
  }
}

}  // namespace

cudaError_t sum_columns(Dtype param_dtype, int64_t batch, int64_t width, const Partials& partials,
                        std::initializer_list<ColumnGradients> gradients, cudaStream_t stream) {
  Stage s{};
  bool any = false, across_samples = false;
  int count = 0;
  for (const ColumnGradients& each : gradients) {
    s.gradients[count++] = each;
    any |= each.per_sample != nullptr || each.per_width != nullptr;
    across_samples |= each.per_width != nullptr && batch > 1;
  }
  if (!any) return cudaSuccess;
  s.param_dtype = param_dtype;
  s.batch = batch;
  s.splits = partials.splits;
  s.width = width;
  s.tiles = ceil_div(width, tile);
  s.partials = static_cast<float*>(partials.data);
  Grid grid{0, dim3(tile, lanes), tile * lanes * int(sizeof(float))};
  const int64_t runs = count * batch * s.tiles, samples = count * s.tiles;
  grid.blocks = std::min(runs, max_blocks);
  const cudaError_t error = launch<sum_runs>(grid, stream, s, runs);
  if (error != cudaSuccess || !across_samples) return error;
  grid.blocks = std::min(samples, max_blocks);
  return launch<sum_samples>(grid, stream, s, samples);
}

}  // namespace twostep::cuda
