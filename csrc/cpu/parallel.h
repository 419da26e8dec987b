// How the work of a kernel is cut up: by shape alone, never by the number of threads, so that results are the same
// bits whatever runs them. A Run is some consecutive rows of one sample; a thread takes a range of runs.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace twostep::cpu {

// Calls the function given to set_parallel_for.
void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

namespace TWOSTEP_ISA {

TWOSTEP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TWOSTEP_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
TWOSTEP_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Run {
  int64_t batch, split;  // split: which run of the sample
  int64_t begin, end;    // rows of the sample; may be empty
};

struct Runs {
  int64_t batch, length, per_sample, rows;

  int64_t count() const { return batch * per_sample; }
  Run operator[](int64_t i) const {
    const int64_t split = i % per_sample;
    const int64_t begin = smaller(split * rows, length);
    return {i / per_sample, split, begin, smaller(begin + rows, length)};
  }
};

// Runs of about 16384 elements (of `width` each row): enough to hide the cost of the modulation row at the start of
// a run, few enough elements to keep 64 cores busy at 1024 tokens of 1024.
inline Runs short_runs(int64_t batch, int64_t length, int64_t width) {
  const int64_t rows = larger(1, 16384 / larger(width, 1));
  return {batch, length, divide_up(length, rows), rows};
}

// The runs that Partials describes: `splits` a sample.
inline Runs split_runs(int64_t batch, int64_t length, int64_t splits) {
  return {batch, length, splits, divide_up(length, splits)};
}

// body(first, last): a range of runs. A thread is worth waking for 32768 elements (torch's own grain).
template <class F>
void parallel(int64_t count, int64_t elements_each, const F& body) {
  if (count <= 0) return;
  const int64_t grain = larger(1, 32768 / larger(elements_each, 1));
  const Body call = [](int64_t first, int64_t last, void* context) { (*static_cast<const F*>(context))(first, last); };
  parallel_for(0, count, grain, call, const_cast<F*>(&body));
}

}  // namespace TWOSTEP_ISA
}  // namespace twostep::cpu
