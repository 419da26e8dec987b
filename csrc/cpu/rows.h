// Row primitives that the kernels share: walking a row by vectors, sums over it, scratch rows, parameters turned into
// rows of the accumulation type, and the way a finished row reaches memory.
#pragma once

#include <new>

#include "parallel.h"
#include "vec_math.h"

namespace twostep::cpu::TWOSTEP_ISA {

// --- walking

// The number of an accumulator: 0 .. kSlots - 1, a constant to the compiler.
template <int kIndex>
struct Slot {
  constexpr operator int() const { return kIndex; }
};

// body(d, lanes) for every vector of a row.
template <class A, class F>
TWOSTEP_INLINE void for_vectors(int64_t width, const F& body) {
  constexpr int64_t w = kLanes<A>;
  int64_t d = 0;
  for (; d + w <= width; d += w) body(d, Full{});
  if (d < width) body(d, Part{width - d});
}

// A sum over a row, in four accumulators, so that additions do not wait for each other. Every kFold additions they are
// folded into one more and start again: a float that takes in thousands of terms one by one loses what pairwise
// summation keeps (16384 columns in 16-byte vectors: 9 ulp in a gradient where PyTorch has 1).
constexpr int kSlots = 4;
constexpr int64_t kFold = 64;
template <class A>
struct Sums {
  Vec<A> slots[kSlots] = {};
  Vec<A> folded = {};
  TWOSTEP_INLINE void fold() {
    folded += (slots[0] + slots[1]) + (slots[2] + slots[3]);
    for (Vec<A>& slot : slots) slot = Vec<A>{};
  }
  TWOSTEP_INLINE A total() const { return sum_lanes(folded); }
};

// body(d, lanes, slot) for every vector of a row; folds the sums that it adds to.
template <class A, class F, class... S>
TWOSTEP_INLINE void sum_vectors(int64_t width, const F& body, S&... sums) {
  constexpr int64_t w = kLanes<A>;
  int64_t d = 0;
  while (d + kSlots * w <= width) {
    const int64_t end = smaller(width, d + kFold * kSlots * w);
    for (; d + kSlots * w <= end; d += kSlots * w) {
      body(d, Full{}, Slot<0>{});
      body(d + w, Full{}, Slot<1>{});
      body(d + 2 * w, Full{}, Slot<2>{});
      body(d + 3 * w, Full{}, Slot<3>{});
    }
    (sums.fold(), ...);
  }
  for (; d + w <= width; d += w) body(d, Full{}, Slot<0>{});
  if (d < width) body(d, Part{width - d}, Slot<1>{});
  (sums.fold(), ...);
}

// The same for a long body, which hides an addition by itself: one slot, and a quarter of the code.
template <class A, class F, class... S>
TWOSTEP_INLINE void sum_vectors_singly(int64_t width, const F& body, S&... sums) {
  constexpr int64_t w = kLanes<A>;
  int64_t d = 0;
  while (d + w <= width) {
    const int64_t end = smaller(width, d + kFold * w);
    for (; d + w <= end; d += w) body(d, Full{}, Slot<0>{});
    (sums.fold(), ...);
  }
  if (d < width) body(d, Part{width - d}, Slot<0>{});
  (sums.fold(), ...);
}

// Asks for memory that the next row will want, while this one, already in cache, is worked on: the processor looks no
// further ahead than some 500 instructions by itself. qk_norm_rope in bf16 goes from 67 % to 96 % of a copy's speed.
// Kernels that read once, from front to back, need none: there the processor looks ahead well enough, and asking costs
// a sixth on an EPYC.
TWOSTEP_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

TWOSTEP_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
TWOSTEP_INLINE double square_root(double v) { return __builtin_sqrt(v); }

// --- sums over a row

// sum (x - center)
template <class T>
TWOSTEP_INLINE Acc<T> sum(const T* x, Acc<T> center, int64_t width) {
  using A = Acc<T>;
  Sums<A> s;
  sum_vectors<A>(
      width,
      [&](int64_t d, auto lanes, auto slot)
          TWOSTEP_LAMBDA { s.slots[slot] += keep<A>(load(x + d, lanes) - center, lanes); },
      s);
  return s.total();
}

// A mean and the mean of what it leaves: the sum of a row whose mean is large rounds by more than the mean's own ulp.
template <class T>
TWOSTEP_INLINE Acc<T> corrected_mean(const T* x, Acc<T> mean, int64_t width) {
  return mean + sum(x, mean, width) / static_cast<Acc<T>>(width);
}

// sum (x - center)^2
template <class T>
TWOSTEP_INLINE Acc<T> sum_squares(const T* x, Acc<T> center, int64_t width) {
  using A = Acc<T>;
  Sums<A> s;
  sum_vectors<A>(
      width,
      [&](int64_t d, auto lanes, auto slot) TWOSTEP_LAMBDA {
        const Vec<A> v = keep<A>(load(x + d, lanes) - center, lanes);
        s.slots[slot] += v * v;
      },
      s);
  return s.total();
}

template <class A>
struct Moments {
  A mean, rstd;
};

// Layer norm takes the mean first and the deviations from it second: the row is in cache by then, and nothing
// cancels where the mean is large.
template <Norm kNorm, class T>
TWOSTEP_INLINE Moments<Acc<T>> moments(const T* x, int64_t width, double eps) {
  using A = Acc<T>;
  const A mean = kNorm == Norm::layer ? corrected_mean(x, sum(x, A{0}, width) / static_cast<A>(width), width) : A{0};
  const A variance = sum_squares(x, mean, width) / static_cast<A>(width);
  return {mean, 1 / square_root(variance + static_cast<A>(eps))};
}

// --- scratch

// Some rows of scratch memory for one thread: on the stack where they are narrow, on the heap where not.
class Scratch {
 public:
  // Room for `rows` rows of `width` elements of at most `element` bytes.
  Scratch(int64_t rows, int64_t width, int64_t element) {
    const int64_t bytes = rows * row_bytes(width * element);
    if (bytes > int64_t{sizeof stack_}) heap_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t{64});
    next_ = heap_ ? static_cast<char*>(heap_) : stack_;
  }
  ~Scratch() {
    if (heap_) ::operator delete(heap_, std::align_val_t{64});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class U>
  U* row(int64_t width) {
    U* p = reinterpret_cast<U*>(next_);
    next_ += row_bytes(width * int64_t{sizeof(U)});
    return p;
  }

 private:
  using size_t = decltype(sizeof 0);
  static int64_t row_bytes(int64_t bytes) { return divide_up(bytes, 64) * 64; }
  alignas(64) char stack_[8192];
  void* heap_ = nullptr;
  char* next_;
};

// --- parameters

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) for the storage type of a dtype.
template <class F>
TWOSTEP_INLINE void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<float>{});
    case Dtype::bf16: return f(Type<Bf16>{});
    case Dtype::f16: return f(Type<F16>{});
    case Dtype::f64: return f(Type<double>{});
  }
}

// The same for a parameter of an op that accumulates in A: never f64 beside float, nor another beside double.
template <class A, class F>
TWOSTEP_INLINE void with_param_type(Dtype dtype, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(Type<double>{});
  } else {
    switch (dtype) {
      case Dtype::bf16: return f(Type<Bf16>{});
      case Dtype::f16: return f(Type<F16>{});
      default: return f(Type<float>{});
    }
  }
}

template <class A>
void load_params(Dtype dtype, const void* data, int64_t offset, int64_t n, A* out) {
  with_param_type<A>(dtype, [&](auto type) TWOSTEP_LAMBDA {
    const auto* p = static_cast<const typename decltype(type)::type*>(data) + offset;
    for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA { store(out + d, load(p + d, lanes), lanes); });
  });
}

template <class A>
void store_params(Dtype dtype, void* data, int64_t offset, int64_t n, const A* values) {
  with_param_type<A>(dtype, [&](auto type) TWOSTEP_LAMBDA {
    auto* p = static_cast<typename decltype(type)::type*>(data) + offset;
    for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA { store(p + d, load(values + d, lanes), lanes); });
  });
}

template <class A>
void fill_row(A* out, int64_t n, A value) {
  for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA { store(out + d, fill(value), lanes); });
}

// A width-long weight as a row; ones where it is absent.
template <class A>
void load_weight(Dtype dtype, const void* weight, int64_t offset, int64_t n, A* out) {
  if (weight) return load_params(dtype, weight, offset, n, out);
  fill_row(out, n, A{1});
}

// What multiplies a normalised row beside its weight: 1 + scale, gate or tanh(gate); 1 where it is absent.
enum class Modulation { scale, gate, tanh_gate };

TWOSTEP_INLINE Modulation modulation_of(GateAct act) {
  return act == GateAct::tanh ? Modulation::tanh_gate : Modulation::gate;
}

// value and, where asked for, its derivative with respect to the parameter.
template <class A>
void load_modulation(Modulation kind, Dtype dtype, const void* data, int64_t offset, int64_t n, A* value,
                     A* derivative = nullptr) {
  if (derivative) fill_row(derivative, n, A{1});
  if (!data) return fill_row(value, n, A{1});
  load_params(dtype, data, offset, n, value);
  if (kind == Modulation::scale) {
    for_vectors<A>(n,
                   [&](int64_t d, auto lanes) TWOSTEP_LAMBDA { store(value + d, 1 + load(value + d, lanes), lanes); });
  } else if (kind == Modulation::tanh_gate) {
    for_vectors<A>(n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA {
      const Vec<A> t = tanh(load(value + d, lanes));
      store(value + d, t, lanes);
      if (derivative) store(derivative + d, (1 - t) * (1 + t), lanes);
    });
  }
}

// out = a * b
template <class A>
void multiply_rows(const A* a, const A* b, int64_t n, A* out) {
  for_vectors<A>(
      n, [&](int64_t d, auto lanes) TWOSTEP_LAMBDA { store(out + d, load(a + d, lanes) * load(b + d, lanes), lanes); });
}

TWOSTEP_INLINE int64_t offset_of(const ConstRows& rows, int64_t b, int64_t l) {
  return b * rows.batch_stride + l * rows.token_stride;
}

template <class T>
TWOSTEP_INLINE const T* row_of(const ConstRows& rows, int64_t b, int64_t l) {
  return static_cast<const T*>(rows.data) + offset_of(rows, b, l);
}
template <class T>
TWOSTEP_INLINE T* row_of(const Rows& rows, int64_t b, int64_t l) {
  return static_cast<T*>(rows.data) + b * rows.batch_stride + l * rows.token_stride;
}

// --- the way out

// A whole vector past the caches; p is a multiple of its size. Where the processor cannot, the ordinary way.
template <class V>
TWOSTEP_INLINE void store_past_caches(void* p, V v) {
#if TWOSTEP_X86
  if constexpr (sizeof(V) == 8) {
    _mm_stream_si64(static_cast<long long*>(p), bit_cast<long long>(v));
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(v));
#if TWOSTEP_AVX2
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
#endif
#if TWOSTEP_AVX512
  } else if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(v));
#endif
  } else {
    static_assert(sizeof(V) == 0, "no store past the caches has this size");
  }
#else
  __builtin_memcpy(p, &v, sizeof v);
#endif
}

// Where a row of an output goes, and how its whole vectors get there.
template <class T>
struct To {
  T* p;
  bool past_caches;
  TWOSTEP_INLINE To operator+(int64_t d) const { return {p + d, past_caches}; }
};

template <class T>
TWOSTEP_INLINE void store(To<T> to, Vec<Acc<T>> v, Full full) {
  if (to.past_caches) {
    store_past_caches(to.p, narrow(T{}, v));
  } else {
    store(to.p, v, full);
  }
}
template <class T>
TWOSTEP_INLINE void store(To<T> to, Vec<Acc<T>> v, Part part) {
  store(to.p, v, part);
}

// Outputs of this size and more are written past the caches. An ordinary store first reads the line that it is about
// to overwrite: measured on 2 cores of a Xeon with 36 MB tensors, a copy moves 27 GB/s with ordinary stores and 37-42
// with streaming ones. On an EPYC they are equally fast, as long as a vector leaves when it is made: a whole row that
// leaves at once keeps reads waiting (1.7 ms for 1.4).
constexpr int64_t kStreamFrom = int64_t{4} << 20;

// One output tensor of `elements` elements. Its parts begin at multiples of `step` elements from a row's destination.
template <class T>
class Output {
 public:
  Output(int64_t elements, int64_t step)
      : streams_(TWOSTEP_X86 && elements * int64_t{sizeof(T)} >= kStreamFrom &&
                 step * int64_t{sizeof(T)} % TWOSTEP_VECTOR_BYTES == 0) {}
  ~Output() {
#if TWOSTEP_X86
    if (streams_) _mm_sfence();
#endif
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  TWOSTEP_INLINE To<T> row(T* destination) const {
    return {destination, streams_ && reinterpret_cast<uintptr_t>(destination) % TWOSTEP_VECTOR_BYTES == 0};
  }

 private:
  bool streams_;
};

}  // namespace twostep::cpu::TWOSTEP_ISA
