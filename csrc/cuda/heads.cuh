// What rope and qk_norm_rope share: how heads are dealt to teams, how a head is held, how pairs turn.
//
// A team of at most 32 threads works on one head: 16 bytes a thread where a head fits that way (16 lanes for 128
// bf16 elements), else a loop over pairs of elements. A block has `head_slots` teams side by side on the heads of one
// token, times as many tokens as fill it; each team takes a few heads at once, all their loads issued
// before the first use, with the token's frequencies read once. Blocks take runs of tokens, one tensor (q or k) each.
// There is no block-wide barrier in the loop: a head's sum stays within a warp.
#pragma once

#include "launch.cuh"
#include "team.cuh"
#include "vectors.cuh"

namespace twostep::cuda {

constexpr int heads_block = 256;
constexpr int heads_lanes = 32;
constexpr int heads_resident = 1024;  // 64 registers a thread, blocks of up to 256: four on a multiprocessor
// Elements a lane holds of a head; wider heads are looped over.
constexpr int head_elements = 8;

// Heads that a team takes at once, where a thread's registers have room for so many vectors and a head has V of them.
template <int Vectors, int V>
constexpr int heads_in_flight = V == 0 ? 1 : Vectors / (V > 0 ? V : 1);

struct HeadPlan {
  int64_t runs;    // a sample
  int64_t tokens;  // a run
  int head_slots, token_slots;
};

// One head of one tensor: held in registers as it came (V > 0), or read again from cache (V = 0).
template <class T, int W, int V>
struct Head {
  uint4 raw[V > 0 ? V : 1];
  const T* at;

  template <class Team>
  __device__ void fetch(const Team& team, const T* from) {
    at = from;
    if constexpr (V > 0) {
      team.columns([&](int v, int column) { raw[v] = __ldg(reinterpret_cast<const uint4*>(from + column)); });
    }
  }
  __device__ void read(int v, int column, float (&out)[W]) const {
    if constexpr (V > 0) {
      decode<T>(raw[v], out);
    } else {
      load<W>(at + column, out);
    }
  }
};

// Where a token's heads start.
template <class T>
__device__ inline const T* heads_of(const ConstHeads& x, int b, int64_t l) {
  return static_cast<const T*>(x.data) + b * x.batch_stride + l * x.token_stride;
}

__device__ inline const float* frequencies_of(const ConstRows& freqs, int b, int64_t l) {
  return static_cast<const float*>(freqs.data) + b * freqs.batch_stride + l * freqs.token_stride;
}

// Turns the pairs of x by (cos, sin), interleaved like them; direction -1 turns them back.
template <int W>
__device__ inline void turn(const float (&freqs)[W], float direction, float (&x)[W]) {
#pragma unroll
  for (int e = 0; e < W; e += 2) {
    const float cosine = freqs[e], sine = direction * freqs[e + 1], first = x[e], second = x[e + 1];
    x[e] = first * cosine - second * sine;
    x[e + 1] = first * sine + second * cosine;
  }
}

// Where this team starts: its head, its token, and the run of tokens its block takes.
struct HeadRun {
  int64_t begin;
  int b, count, head, token;  // a grid holds fewer than 2^31 blocks, and so samples

  __device__ HeadRun(const HeadPlan& plan, int64_t block, int64_t length)
      : begin(block % plan.runs * plan.tokens), b(int(block / plan.runs)) {
    const int64_t left = length - begin;
    count = int(left < 0 ? 0 : left < plan.tokens ? left : plan.tokens);
    head = int(threadIdx.y) % plan.head_slots;
    token = int(threadIdx.y) / plan.head_slots;
  }

  // As in Run: keeps the compiler from holding every tensor's address through the loop over tokens.
  __device__ void forget() {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(b), "+l"(begin));
#endif
  }
};

struct HeadProblem {
  int64_t batch, length, width, heads;  // the larger number of heads
  int tensors;
  bool aligned;
  int in_flight;                  // vectors of 16 bytes a thread holds of each tensor at once
  int resident = heads_resident;  // threads on a multiprocessor
  bool lines = false;             // a line of floats for each team in shared memory
  int64_t most_runs = max_blocks;
};

struct HeadLaunch {
  HeadPlan plan;
  Grid grid;
};

inline HeadLaunch plan_heads(const Device& device, const HeadProblem& problem, int64_t vectors, int in_flight) {
  const int lanes = team_size(std::min<int64_t>(vectors, heads_lanes), heads_lanes);
  const int slots = heads_block / lanes;
  HeadLaunch launch;
  launch.plan.head_slots = int(std::clamp<int64_t>(ceil_div(problem.heads, in_flight), 1, slots));
  launch.plan.token_slots = int(std::clamp<int64_t>(slots / launch.plan.head_slots, 1, problem.length));
  const int teams = launch.plan.head_slots * launch.plan.token_slots;
  const int blocks = std::max(problem.resident / (teams * lanes), 1);
  const int64_t filling = std::max<int64_t>(int64_t(device.multiprocessors) * blocks / problem.tensors, 1);
  const int64_t most = std::min(problem.most_runs, ceil_div(problem.length, launch.plan.token_slots));
  launch.plan.runs = std::clamp<int64_t>(filling / problem.batch, 1, most);
  launch.plan.tokens = ceil_div(problem.length, launch.plan.runs);
  launch.grid.blocks = problem.batch * launch.plan.runs * problem.tensors;
  launch.grid.block = dim3(lanes, teams);
  launch.grid.shared = problem.lines ? int(teams * problem.width * int(sizeof(float))) : 0;
  return launch;
}

// f(T, vector width, vectors a lane, launch), as launch_rows.
template <class F>
cudaError_t launch_heads(Dtype dtype, const HeadProblem& problem, F&& f) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int W = wide_vector<T>, V = head_elements / W;
    if (problem.aligned && problem.width % W == 0 && ceil_div(problem.width, W * V) <= heads_lanes) {
      const HeadLaunch launch = plan_heads(device, problem, ceil_div(problem.width, W * V), problem.in_flight / V);
      return f(element, std::integral_constant<int, W>{}, std::integral_constant<int, V>{}, launch);
    }
    const HeadLaunch launch = plan_heads(device, problem, problem.width / 2, 1);
    return f(element, std::integral_constant<int, 2>{}, std::integral_constant<int, 0>{}, launch);
  });
}

}  // namespace twostep::cuda
