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

  // The first row among all rows.
  __device__ int64_t row(int64_t length) const { return b * length + begin; }
};

// The run's row of sum `which` in partials.
__device__ inline float* partial_sums(const Partials& partials, int which, const Run& run, int64_t batch,
                                      int64_t width) {
  return static_cast<float*>(partials.data) + ((which * batch + run.b) * partials.splits + run.index) * width;
}

// This thread's 16-byte slots, `count` of them, from byte `begin` of the block's shared memory. A warp's slots are
// together and its threads interleaved: slot n is 32 n further, an offset the compiler knows, and a warp's accesses
// fill whole lines.
class Slots {
 public:
  __device__ Slots(int begin, int count) {
    const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
    own_ = begin + ((thread >> 5) * (count * 32) + (thread & 31)) * 16;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(own_));  // or the compiler computes it again at every access
#endif
  }
  __device__ uint4* operator[](int n) const { return reinterpret_cast<uint4*>(shared_memory() + own_) + n * 32; }

 private:
  int own_;
};

// W floats as they are, in 16-byte slots `stride` apart.
template <int W>
__device__ inline void put_floats(const Slots& slots, int first, int stride, const float (&in)[W]) {
#pragma unroll
  for (int e = 0; e < W; e += 4) shared_store(slots[first + e / 4 * stride], encode<float>(in + e));
}

template <int W>
__device__ inline void get_floats(const Slots& slots, int first, int stride, float (&out)[W]) {
#pragma unroll
  for (int e = 0; e < W; e += 4) decode<float>(shared_load(slots[first + e / 4 * stride]), out + e);
}

// K input tensors of dtype T, read row by row; the first may be absent where MayMiss says so.
template <class T, int W, int V, int K, bool MayMiss = false>
class Inputs {
 public:
  static constexpr int row_slots = K * V;  // of one thread

  __device__ Inputs(int begin, int ahead) : slots_(begin, row_slots * (ahead + 1)), ahead_(ahead) {}

  // Starts a run; tensors(k) is tensor k.
  template <class Team, class Tensors>
  __device__ void open(const Team& team, const Run& run, Tensors tensors) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const ConstRows& x = tensors(k);
      row_[k] = static_cast<const T*>(x.data) + run.b * x.batch_stride + run.begin * x.token_stride;
    }
    if constexpr (V > 0) {
      slot_ = ahead_ * row_slots;
      for (int i = 0; i < ahead_; ++i) fetch(team, i * row_slots, i < run.count, tensors);
    }
  }

  // Makes row i readable and sends for row i + ahead, whose slot the row before this one has left.
  template <class Team, class Tensors>
  __device__ void next(const Team& team, const Run& run, int i, Tensors tensors) {
    if constexpr (V > 0) {
      const int freed = slot_;
      slot_ = slot_ == ahead_ * row_slots ? 0 : slot_ + row_slots;
      fetch(team, freed, i + ahead_ < run.count, tensors);
      wait_for_copies(ahead_);
    } else if (i > 0) {
      advance(tensors);
    }
  }

  // Vector v of tensor k, which is present, of the row that next made readable.
  __device__ void read(int k, int v, int column, float (&out)[W]) const {
    if constexpr (V > 0) {
      decode<T>(shared_load(slots_[slot_ + k * V + v]), out);
    } else {
      load<W>(row_[k] + column, out);
    }
  }

  // Puts floats where this thread's vector v of tensor k was, and that of k + 1 where W floats need both slots.
  __device__ void keep(int k, int v, const float (&in)[W]) { put_floats<W>(slots_, slot_ + k * V + v, V, in); }
  __device__ void kept(int k, int v, float (&out)[W]) const { get_floats<W>(slots_, slot_ + k * V + v, V, out); }

 private:
  template <class Tensors>
  __device__ void advance(Tensors tensors) {
#pragma unroll
    for (int k = 0; k < K; ++k) row_[k] += tensors(k).token_stride;
  }

  template <class Team, class Tensors>
  __device__ void fetch(const Team& team, int slot, bool wanted, Tensors tensors) {
    if (wanted) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (MayMiss && k == 0 && tensors(0).data == nullptr) continue;
        team.columns(
            [&](int v, int column) { __pipeline_memcpy_async(slots_[slot + k * V + v], row_[k] + column, 16); });
      }
      advance(tensors);
    }
    __pipeline_commit();  // an empty group too: groups are counted
  }

  const T* row_[K];  // V > 0: to send for next; V = 0: at hand
  Slots slots_;
  int ahead_, slot_ = 0;  // the first slot of the row at hand
};

// N floats for each of this thread's columns, in slots of shared memory that no other thread touches.
template <int W, int V, int N>
class Columns {
 public:
  static constexpr int slots = N * V * W / 4;  // of one thread

  __device__ explicit Columns(int begin) : slots_(begin, slots) {}
  __device__ void set(int n, int v, const float (&in)[W]) { put_floats<W>(slots_, (n * V + v) * (W / 4), 1, in); }
  __device__ void get(int n, int v, float (&out)[W]) const { get_floats<W>(slots_, (n * V + v) * (W / 4), 1, out); }
  // Where the block's shared memory after these begins.
  __device__ static int end(int begin) { return begin + slots * 16 * int(blockDim.x * blockDim.y); }

 private:
  Slots slots_;
};

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
