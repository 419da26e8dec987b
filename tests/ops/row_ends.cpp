// The end of a row, csrc/cpu/vec.h: a Part touches its own elements and no byte more. Compiled for one instruction set
// and run by test_row_ends.py. Elements stand at the end of a page behind which nothing may be read or written, and
// are surrounded by others that must stay. A sanitizer does not see what masked instructions do.
#include "cpu/vec.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace twostep::cpu::TWOSTEP_ISA;

namespace {

char* end_of_readable_memory() {
  const long page = sysconf(_SC_PAGESIZE);
  void* two = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (two == MAP_FAILED || mprotect(static_cast<char*>(two) + page, page, PROT_NONE)) std::exit(2);
  return static_cast<char*>(two) + page;
}

void expect(bool holds, const char* type, const char* what, int64_t n) {
  if (holds) return;
  std::printf("%s, %d of a vector: %s\n", type, static_cast<int>(n), what);
  std::exit(1);
}

// T's value of a small whole number, which all four types hold.
template <class T>
T number(int v) {
  Vec<Acc<T>> whole{};
  whole[0] = static_cast<Acc<T>>(v);
  T buffer[kLanes<Acc<T>>];
  store(buffer, whole, Full{});
  return buffer[0];
}

template <class T>
void check(const char* type, char* end) {
  using A = Acc<T>;
  constexpr int64_t w = kLanes<A>;
  for (int64_t n = 1; n < w; ++n) {
    T* row = reinterpret_cast<T*>(end) - n;
    for (int64_t i = -w; i < n; ++i) row[i] = number<T>(static_cast<int>(100 + i));

    const Vec<A> loaded = load(row, Part{n});
    for (int64_t i = 0; i < w; ++i) {
      expect(loaded[i] == (i < n ? static_cast<A>(100 + i) : A{0}), type, "loads something else", n);
    }

    Vec<A> values;
    for (int64_t i = 0; i < w; ++i) values[i] = static_cast<A>(i + 1);
    store(row, values, Part{n});  // a byte behind is a fault
    store(row - w, values, Part{n});
    for (int64_t i = -w; i < n; ++i) {
      const int64_t at = i < n - w ? i + w + 1 : i < 0 ? 100 + i : i + 1;
      const T wanted = number<T>(static_cast<int>(at));
      expect(std::memcmp(row + i, &wanted, sizeof wanted) == 0, type, "stores something else", n);
    }
  }
}

}  // namespace

int main() {
  char* end = end_of_readable_memory();
  check<float>("float", end);
  check<double>("double", end);
  check<Bf16>("bfloat16", end);
  check<F16>("float16", end);
}
