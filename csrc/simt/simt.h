// A small device on the host: blocks one after another, threads as fibers, shared memory, barriers, warp shuffles.
//
// Kernels compile from the same source as for the GPU (csrc/simt/include stands in for the CUDA headers) and run one
// block at a time. Within a block one fiber runs until it waits (barrier, shuffle) or ends; which fiber is next is
// decided by a schedule: forward, reverse, or shuffled by a seed. What the emulation reports as an error:
//   - device memory read or written outside the ranges a test registered, or without the access's own alignment
//   - device memory written by two threads of a launch, or read by another thread than the one that wrote it
//   - shared memory outside the block's, misaligned, read before it is written, or shared between threads
//     without a barrier in between (found by bookkeeping, whatever the schedule)
//   - a shared slot read while an asynchronous copy into it has not been waited for
//   - a barrier that a thread never reaches, or that threads reach from different places
//   - a shuffle that names an ended lane, or leaves out the caller or the source
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3() = default;
  Dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Position {
  Dim3 thread, block, block_dim, grid_dim;
};
const Position& position();

// Runs a kernel over a grid; throws std::runtime_error with what went wrong and where.
void run(unsigned blocks, Dim3 block, int shared_bytes, const std::function<void()>& kernel);

unsigned char* shared_memory();
void shared_read(const void* from, size_t bytes);
void shared_write(void* to, size_t bytes);

void global_read(const void* from, size_t bytes);
void global_write(void* to, size_t bytes);

void barrier(const char* file, int line);
uint64_t shuffle_xor(unsigned mask, uint64_t value, int lane_mask);

void copy_async(void* shared, const void* global, size_t bytes);
void commit_copies();
void wait_copies(size_t newer);

// What tests set.
enum class Order { forward, reverse, shuffled };
struct Settings {
  int multiprocessors = 4;
  int shared_per_block = 232448;           // H200
  int shared_per_multiprocessor = 233472;  // H200
  Order order = Order::forward;
  uint64_t seed = 0;
};
Settings& settings();

// Device memory: only registered ranges may be touched. Stand for cudaMalloc; `writable` as the test promises.
void register_range(const void* data, size_t bytes, bool writable);
void clear_ranges();

struct Counts {
  uint64_t launches, blocks, threads, barriers, vector_reads, vector_writes;
};
Counts& counts();

}  // namespace simt
