// What the row kernels share: how rows are dealt to teams, how a row's inputs arrive, how column sums are kept.
//
// Deal: each sample's rows are cut into runs, one for each team. What depends on the sample alone is read once a run.
//
// Arrival: each thread copies its own vectors of the next rows to its own slots of shared memory with cp.async,
// `ahead` rows before they are needed. No registers are held meanwhile and no barrier is needed, since no thread
// reads another's slots; the copies of the rows to come cover the latency of memory and of the barrier inside
// each row's reductions. A row is read from its slot once a phase: 16 bytes a thread from shared memory cost less
// than registers that would halve the blocks resident. A backward keeps the factors of its columns there too.
// With V = 0 (rows too wide, or not aligned for 16-byte accesses) rows are read from device memory in each phase,
// the second time from cache.
#pragma once

#include "team.cuh"
#include "vectors.cuh"

namespace twostep::cuda {

// Sixteen elements a thread. A backward then holds three column sums in 48 of its 128 registers, and a reduction over
// width 3840 crosses 8 warps. Half the elements at half the registers would hold the same sums beside twice the
// addresses, and cross twice the warps.
constexpr int elements_per_thread = 16;

// A kernel's budget: __launch_bounds__(max_threads, resident / max_threads), so that `resident` threads certainly
// reside on a multiprocessor. Grids fill exactly one such wave; a second, partly filled one would cost up to half of
// the speed.
struct Budget {
  int max_threads, resident;
};
constexpr Budget light{384, 768};  // 80 registers a thread: three blocks for width 3840
constexpr Budget heavy{512, 512};  // 128 registers a thread: two blocks for width 3840

struct RowPlan {
  int64_t runs;  // a sample
  int64_t rows;  // a run
  int ahead;     // rows copied ahead, 0 to max_copies_ahead
};

// Rows `begin` to `begin + count` of sample b. Rows within a run are counted in 32 bits: a run of 2^31 rows would not
// fit a device, and 64-bit counters cost registers that the sums need.
struct Run {
  int64_t b, index, begin;
  int count;

  // The run of this team. In the last block b may lie past the batch: that team has nothing to do. (A team that is a
  // whole block always has a run, so none misses a barrier.)
  __device__ Run(const RowPlan& plan, int64_t length) {
    const int64_t run = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    b = run / plan.runs;
    index = run - b * plan.runs;
    begin = index * plan.rows;
    const int64_t left = length - begin;
    count = int(left < 0 ? 0 : left < plan.rows ? left : plan.rows);
  }

  // Row i among all rows.
  __device__ int64_t row(int64_t length, int i) const { return b * length + begin + i; }

  // Makes the run's place opaque to the compiler. It would otherwise compute the address of every tensor's first row
  // before the loop over rows and keep them all, which costs a backward more registers than it has.
  __device__ void forget() {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(b), "+l"(begin));
#endif
  }
};

// Row i of a run.
template <class T>
__device__ inline const T* row_of(const ConstRows& rows, const Run& run, int i) {
  const int64_t offset = run.b * rows.batch_stride + (run.begin + i) * rows.token_stride;
  return static_cast<const T*>(rows.data) + offset;
}

// The run's row of sum `which` in partials.
__device__ inline float* partial_sums(const Partials& partials, int which, const Run& run, int64_t batch,
                                      int64_t width) {
  return static_cast<float*>(partials.data) + ((which * batch + run.b) * partials.splits + run.index) * width;
}

// This thread's first 16-byte slot, where each thread has `slots` of them. A warp's slots are together and its threads
// interleaved: slot n is 32 n further, an offset the compiler knows, and a warp's accesses fill whole lines.
__device__ inline uint4* own_slots(unsigned char* shared, int slots) {
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  return reinterpret_cast<uint4*>(shared) + (thread >> 5) * (slots * 32) + (thread & 31);
}

// K input tensors of dtype T, read row by row.
template <class T, int W, int V, int K>
class Inputs {
 public:
  static constexpr int slot_vectors = K * V;  // of 16 bytes, for one thread and one row

  __device__ Inputs(unsigned char* shared, int ahead)
      : own_(own_slots(shared, slot_vectors * (ahead + 1))), ahead_(ahead) {}

  // Starts a run. rows(k, i) is the address of row i of tensor k, null where the tensor is absent.
  template <class Team, class Rows>
  __device__ void open(const Team& team, const Run& run, Rows rows) {
    if constexpr (V > 0) {
      slot_ = ahead_;
      for (int i = 0; i < ahead_; ++i) fetch(team, i, i, run.count, rows);
    }
  }

  // Makes row i readable and sends for row i + ahead, whose slot the row before this one has left.
  template <class Team, class Rows>
  __device__ void next(const Team& team, const Run& run, int i, Rows rows) {
    if constexpr (V > 0) {
      const int freed = slot_;
      slot_ = slot_ == ahead_ ? 0 : slot_ + 1;
      fetch(team, freed, i + ahead_, run.count, rows);
      wait_for_copies(ahead_);
    }
  }

  // Vector v of tensor k, which is present, of row i, which next made readable.
  template <class Rows>
  __device__ void read(int k, int v, int column, int i, Rows rows, float (&out)[W]) const {
    if constexpr (V > 0) {
      decode<T>(shared_load(at(slot_, k, v)), out);
    } else {
      load<W>(rows(k, i) + column, out);
    }
  }

  // Overwrites this thread's vector v of tensor k, and of k + 1 where W floats need both slots, with floats.
  __device__ void keep(int k, int v, const float (&in)[W]) {
#pragma unroll
    for (int e = 0; e < W; e += 4) {
      shared_store(at(slot_, k + e / 4, v), encode<float>(in + e));
    }
  }
  __device__ void kept(int k, int v, float (&out)[W]) const {
#pragma unroll
    for (int e = 0; e < W; e += 4) {
      decode<float>(shared_load(at(slot_, k + e / 4, v)), out + e);
    }
  }

 private:
  template <class Team, class Rows>
  __device__ void fetch(const Team& team, int slot, int i, int count, Rows rows) {
    if (i < count) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T* row = rows(k, i);
        if (row == nullptr) continue;
        team.columns([&](int v, int column) {
          __pipeline_memcpy_async(at(slot, k, v), row + column, 16);
        });
      }
    }
    __pipeline_commit();  // an empty group too: groups are counted
  }

  __device__ uint4* at(int slot, int k, int v) const { return own_ + slot * (slot_vectors * 32) + (k * V + v) * 32; }

  uint4* own_;
  int ahead_, slot_ = 0;
};

// N floats for each of this thread's columns, in slots of shared memory that no other thread touches.
template <int W, int V, int N>
class Columns {
 public:
  static constexpr int slot_vectors = N * V * W / 4;  // of 16 bytes, for one thread

  __device__ explicit Columns(unsigned char* shared) : own_(own_slots(shared, slot_vectors)) {}

  __device__ void set(int n, int v, const float (&in)[W]) {
#pragma unroll
    for (int e = 0; e < W; e += 4) shared_store(at(n, v, e), encode<float>(in + e));
  }
  __device__ void get(int n, int v, float (&out)[W]) const {
#pragma unroll
    for (int e = 0; e < W; e += 4) decode<float>(shared_load(at(n, v, e)), out + e);
  }

 private:
  __device__ uint4* at(int n, int v, int e) const { return own_ + ((n * V + v) * (W / 4) + e / 4) * 32; }
  uint4* own_;
};

// Where a block's shared memory goes: sums, then columns, then rows.
template <class Slots>
__device__ inline unsigned char* after(unsigned char* shared) {
  return shared + Slots::slot_vectors * 16 * int(blockDim.x * blockDim.y);
}

// A sum over a run's rows for each of this thread's columns: registers where they hold a row (V > 0), else the run's
// row of partials itself, which no other thread touches.
template <int W, int V>
struct ColumnSums {
  float sums[V > 0 ? V : 1][W];

  // partial is null where the sum is not wanted; wide rows then skip it.
  template <class Team>
  __device__ void open(const Team& team, float* partial) {
#pragma unroll
    for (int v = 0; v < (V > 0 ? V : 1); ++v) {
#pragma unroll
      for (int i = 0; i < W; ++i) sums[v][i] = 0.f;
    }
    if (V == 0 && partial != nullptr) {
      team.columns([&](int, int column) { store<W>(partial + column, sums[0]); });
    }
  }

  __device__ void add(int v, int column, float* partial, const float (&x)[W]) {
    if constexpr (V > 0) {
#pragma unroll
      for (int i = 0; i < W; ++i) sums[v][i] += x[i];
    } else if (partial != nullptr) {
      add_in_place<W>(partial + column, x);
    }
  }

  template <class Team>
  __device__ void close(const Team& team, float* partial) const {
    if (V > 0 && partial != nullptr) {
      team.columns([&](int v, int column) { store<W>(partial + column, sums[v]); });
    }
  }
};

// One float a row, read a row ahead: rows wait in shared memory, so this would be the loop's only exposed latency.
class RowStatistic {
 public:
  // data holds a float for each row; null where there is no such statistic, and `absent` stands for it.
  __device__ RowStatistic(const void* data, int64_t first_row, const Run& run, float absent)
      : data_(static_cast<const float*>(data)), next_(absent) {
    if (data_ != nullptr && run.count > 0) next_ = __ldg(data_ + first_row);
  }

  // The value of this row, rows taken in order; `more` where another follows.
  __device__ float take(int64_t row, bool more) {
    const float value = next_;
    if (data_ != nullptr && more) next_ = __ldg(data_ + row + 1);
    return value;
  }

 private:
  const float* data_;
  float next_;
};

}  // namespace twostep::cuda
