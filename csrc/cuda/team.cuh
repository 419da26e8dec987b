// A team: the threads that work on one row (or one head), and sums over it.
//
// Thread `lane` of `size` owns the W-element vectors lane, lane + size, lane + 2 size, ... of its row. V of them are
// unrolled so that what belongs to a column can stay in registers; V = 0 is a run-time loop for any width.
// A team of up to 32 threads is a power of two within a warp and reduces by shuffles; a larger one is a whole
// block (size a multiple of 32) and reduces by shuffles, one line of shared memory a warp and one barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shared.cuh"

namespace twostep::cuda {

template <int W_, int V_>
struct Team {
  static constexpr int W = W_, V = V_;
  static constexpr int held = V > 0 ? V : 1;  // vectors of a thread that registers hold

  int lane, size, width;
  unsigned mask;  // the team's threads within this warp

  __device__ explicit Team(int64_t row_width) : lane(threadIdx.x), size(blockDim.x), width(int(row_width)) {
    const int first = int(threadIdx.y * blockDim.x) & 31;
    mask = size < 32 ? ((1u << size) - 1u) << first : 0xffffffffu;
  }

  // f(v, column) for each of this thread's vectors; v indexes held registers, column is its first element.
  template <class F>
  __device__ void columns(F&& f) const {
    if constexpr (V > 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int column = (lane + v * size) * W;
        if (column < width) f(v, column);
      }
    } else {
      for (int column = lane * W; column < width; column += size * W) f(0, column);
    }
  }
};

// Sums over the lanes of a team of at most 32; every lane gets the same bits, since xor adds the same pairs.
template <int K, class Team>
__device__ inline void sum_lanes(const Team& team, float (&values)[K]) {
  if (team.size >= 32) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(0xffffffffu, values[k], distance);
    }
    return;
  }
#pragma unroll 1
  for (int distance = team.size >> 1; distance > 0; distance >>= 1) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(team.mask, values[k], distance);
  }
}

// Sums over whole teams. Two lines of scratch alternate, so one barrier a sum is enough: a thread writes a line
// again only after the barrier of the sum between, which everyone reaches after reading the line.
class TeamSum {
 public:
  static constexpr int max_values = 2, warps = 32;
  static constexpr int bytes = 2 * max_values * warps * int(sizeof(float));

  template <class Team>
  __device__ TeamSum(const Team& team, unsigned char* scratch) : line_(reinterpret_cast<float*>(scratch)) {
    if (team.size <= 32) return;
    // Warps that do not exist count as zero, so that the sum over warps runs in fours.
    for (int i = team.lane; i < bytes / int(sizeof(float)); i += team.size) shared_store(line_ + i, 0.f);
    __syncthreads();
  }

  template <int K, class Team>
  __device__ void operator()(const Team& team, float (&values)[K]) {
    static_assert(K <= max_values);
    sum_lanes(team, values);
    if (team.size <= 32) return;
    float* line = line_ + odd_ * (max_values * warps);
    odd_ ^= 1;
    if ((team.lane & 31) == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) shared_store(line + k * warps + (team.lane >> 5), values[k]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = 0.f;
#pragma unroll 1  // unrolled, the loads of eight warps would take the registers that hold the sums
    for (int warp = 0; warp < (team.size >> 5); warp += 4) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float4 four = shared_load(reinterpret_cast<const float4*>(line + k * warps + warp));
        values[k] += (four.x + four.y) + (four.z + four.w);
      }
    }
  }

 private:
  float* line_;
  int odd_ = 0;
};

}  // namespace twostep::cuda
