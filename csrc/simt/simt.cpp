#include "simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr size_t stack_bytes = 128 * 1024;
constexpr uint32_t nobody = 0, several = 0xffffffff;

// One 2-byte cell of device memory or 4-byte word of shared memory: who touched it last. Threads count from 1.
struct Range {
  uintptr_t begin, end;
  bool writable;
  std::vector<uint32_t> writers, readers;  // one for each 2 bytes, of this launch
};

struct Word {
  uint32_t writer = nobody, reader = nobody;
  uint32_t written = 0, read = 0;  // epoch: barriers passed
  bool initialised = false, in_flight = false;
};

enum class State { ready, at_barrier, at_shuffle, ended };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  Position position;
  State state = State::ended;
  uint32_t index = 0;  // in its block
  const char* file = nullptr;
  int line = 0;
  unsigned mask = 0;  // of the shuffle it waits in
  int lane_mask = 0;
  uint64_t value = 0, received = 0;
  std::vector<Copy> copies;               // not committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Machine {
  Settings settings;
  Counts counts{};
  std::map<uintptr_t, Range> ranges;
  std::vector<std::unique_ptr<Fiber>> fibers;
  size_t live = 0;  // fibers of the block at hand
  ucontext_t scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::vector<uint64_t> shared;  // 8-byte elements: aligned to 16 through `shared_base`
  unsigned char* shared_base = nullptr;
  size_t shared_bytes = 0;
  std::vector<Word> words;
  uint32_t epoch = 1;
  uint32_t first_thread = 0;  // of this block in the launch, for device memory's bookkeeping
  std::string error;
};

Machine& machine() {
  static Machine one;
  return one;
}

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const std::string& what) {
  std::ostringstream message;
  message << what;
  if (const Fiber* fiber = machine().current) {
    const Position& at = fiber->position;
    message << " [block " << at.block.x << ", thread (" << at.thread.x << ", " << at.thread.y << ")]";
  }
  throw Failure(message.str());
}

void enter() {
  Machine& m = machine();
  try {
    (*m.kernel)();
    if (!m.current->copies.empty()) fail("asynchronous copies issued and never committed");
  } catch (const std::exception& error) {
    if (m.error.empty()) m.error = error.what();
  }
  m.current->state = State::ended;
  swapcontext(&m.current->context, &m.scheduler);
}

void wait(State state) {
  Machine& m = machine();
  Fiber* const self = m.current;
  self->state = state;
  swapcontext(&self->context, &m.scheduler);
}

Range& range_of(const void* at, size_t bytes, const char* what) {
  Machine& m = machine();
  const auto address = reinterpret_cast<uintptr_t>(at);
  auto next = m.ranges.upper_bound(address);
  if (next != m.ranges.begin()) {
    Range& range = std::prev(next)->second;
    if (address >= range.begin && address + bytes <= range.end) {
      if (address % bytes != 0) fail(std::string("misaligned ") + what + " of " + std::to_string(bytes) + " bytes");
      return range;
    }
  }
  fail(std::string("out of bounds ") + what + " of " + std::to_string(bytes) + " bytes");
}

size_t shared_words(const void* at, size_t bytes, const char* what, size_t* first) {
  Machine& m = machine();
  const auto offset = static_cast<const unsigned char*>(at) - m.shared_base;
  if (offset < 0 || offset + bytes > m.shared_bytes) fail(std::string("out of bounds shared ") + what);
  if (offset % bytes != 0) fail(std::string("misaligned shared ") + what);
  *first = size_t(offset) / 4;
  return (bytes + 3) / 4;
}

void shared_touch(const void* at, size_t bytes, bool writes, bool copying) {
  Machine& m = machine();
  const uint32_t me = m.current->index + 1;
  size_t first, count = shared_words(at, bytes, writes ? "write" : "read", &first);
  for (size_t i = first; i < first + count; ++i) {
    Word& word = m.words[i];
    if (word.in_flight && !copying) fail("shared memory touched before the copy into it was waited for");
    if (word.written == m.epoch && word.writer != nobody && word.writer != me) {
      fail("race: shared memory written by another thread since the last barrier");
    }
    if (!writes) {
      if (!word.initialised) fail("shared memory read before it was written");
      word.reader = word.read == m.epoch && word.reader != me && word.reader != nobody ? several : me;
      word.read = m.epoch;
      continue;
    }
    if (word.read == m.epoch && word.reader != nobody && word.reader != me) {
      fail("race: shared memory read by another thread since the last barrier");
    }
    word.writer = me;
    word.written = m.epoch;
    word.initialised = !copying;
    word.in_flight = copying;
  }
}

// The order in which a round of the scheduler visits fibers.
std::vector<size_t> visiting_order(std::mt19937_64& random) {
  const Machine& m = machine();
  std::vector<size_t> order(m.live);
  for (size_t i = 0; i < order.size(); ++i) order[i] = m.settings.order == Order::reverse ? order.size() - 1 - i : i;
  if (m.settings.order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Lets every fiber that can run do so; whether any ran.
bool run_round(std::mt19937_64& random) {
  Machine& m = machine();
  bool ran = false;
  for (const size_t i : visiting_order(random)) {
    Fiber& fiber = *m.fibers[i];
    if (fiber.state != State::ready) continue;
    m.current = &fiber;
    swapcontext(&m.scheduler, &fiber.context);
    m.current = nullptr;
    if (!m.error.empty()) throw Failure(m.error);
    ran = true;
  }
  return ran;
}

// Nobody can run: everyone must be at the same barrier, or have ended.
bool release_barrier() {
  Machine& m = machine();
  size_t waiting = 0, ended = 0, shuffling = 0;
  const Fiber* first = nullptr;
  for (size_t i = 0; i < m.live; ++i) {
    const Fiber& fiber = *m.fibers[i];
    ended += fiber.state == State::ended;
    shuffling += fiber.state == State::at_shuffle;
    if (fiber.state != State::at_barrier) continue;
    ++waiting;
    if (first == nullptr) first = &fiber;
    if (fiber.line != first->line || std::strcmp(fiber.file, first->file) != 0) {
      throw Failure("divergent barrier: threads of a block wait at different barriers");
    }
  }
  if (ended == m.live) return false;
  if (shuffling > 0) throw Failure("deadlock: a shuffle waits for lanes that do not come");
  if (ended > 0) throw Failure("deadlock: a barrier waits for threads that have ended");
  for (size_t i = 0; i < m.live; ++i) m.fibers[i]->state = State::ready;
  ++m.epoch;
  ++m.counts.barriers;
  return waiting > 0;
}

void prepare_block(unsigned block, unsigned blocks, Dim3 dim, int shared_bytes) {
  Machine& m = machine();
  m.shared.assign(size_t(shared_bytes) / 8 + 4, ~uint64_t(0));  // poison: NaN at every width
  m.shared_base =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(m.shared.data()) + 15) & ~uintptr_t(15));
  m.shared_bytes = size_t(shared_bytes);
  m.words.assign(size_t(shared_bytes) / 4 + 1, Word{});
  m.epoch = 1;
  m.live = size_t(dim.x) * dim.y * dim.z;
  m.first_thread = uint32_t(block * m.live);
  while (m.fibers.size() < m.live) m.fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < m.live; ++i) {
    Fiber& fiber = *m.fibers[i];
    fiber.index = uint32_t(i);
    fiber.state = State::ready;
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.position.thread = Dim3(unsigned(i % dim.x), unsigned(i / dim.x % dim.y), unsigned(i / (dim.x * dim.y)));
    fiber.position.block = Dim3(block, 0, 0);
    fiber.position.block_dim = dim;
    fiber.position.grid_dim = Dim3(blocks);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

}  // namespace

const Position& position() { return machine().current->position; }
Settings& settings() { return machine().settings; }
Counts& counts() { return machine().counts; }

void run(unsigned blocks, Dim3 block, int shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  m.current = nullptr;
  if (blocks == 0 || threads == 0 || threads > 1024) throw Failure("launch of no block, or of over 1024 threads");
  if (shared_bytes > m.settings.shared_per_block) throw Failure("launch with more shared memory than a block has");
  for (auto& each : m.ranges) {
    std::fill(each.second.writers.begin(), each.second.writers.end(), nobody);
    std::fill(each.second.readers.begin(), each.second.readers.end(), nobody);
  }
  m.kernel = &kernel;
  m.error.clear();
  ++m.counts.launches;
  m.counts.blocks += blocks;
  m.counts.threads += blocks * threads;
  std::mt19937_64 random(m.settings.seed);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = m.settings.order == Order::reverse ? blocks - 1 - i : i;
  if (m.settings.order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
  for (const unsigned each : order) {
    prepare_block(each, blocks, block, shared_bytes);
    do {
      while (run_round(random)) {
      }
    } while (release_barrier());
  }
}

unsigned char* shared_memory() { return machine().shared_base; }
void shared_read(const void* from, size_t bytes) { shared_touch(from, bytes, false, false); }
void shared_write(void* to, size_t bytes) { shared_touch(to, bytes, true, false); }

void global_read(const void* from, size_t bytes) {
  Machine& m = machine();
  Range& range = range_of(from, bytes, "read");
  const uint32_t me = m.first_thread + m.current->index + 1;
  const size_t first = (reinterpret_cast<uintptr_t>(from) - range.begin) / 2;
  for (size_t i = first; i < first + std::max<size_t>(bytes / 2, 1); ++i) {
    if (range.writers[i] != nobody && range.writers[i] != me) fail("race: device memory written by another thread");
    range.readers[i] = range.readers[i] == nobody || range.readers[i] == me ? me : several;
  }
  m.counts.vector_reads += bytes == 16;
}

void global_write(void* to, size_t bytes) {
  Machine& m = machine();
  Range& range = range_of(to, bytes, "write");
  if (!range.writable) fail("write to an input");
  const uint32_t me = m.first_thread + m.current->index + 1;
  const size_t first = (reinterpret_cast<uintptr_t>(to) - range.begin) / 2;
  for (size_t i = first; i < first + std::max<size_t>(bytes / 2, 1); ++i) {
    if (range.writers[i] != nobody && range.writers[i] != me) fail("race: device memory written by two threads");
    if (range.readers[i] != nobody && range.readers[i] != me) fail("race: device memory read by another thread");
    range.writers[i] = me;
  }
  m.counts.vector_writes += bytes == 16;
}

void barrier(const char* file, int line) {
  Fiber& self = *machine().current;
  self.file = file;
  self.line = line;
  wait(State::at_barrier);
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int lane_mask) {
  Machine& m = machine();
  Fiber& self = *m.current;
  const size_t warp = self.index & ~size_t(31);
  const unsigned lane = self.index & 31;
  const unsigned source = lane ^ unsigned(lane_mask);
  if ((mask >> lane & 1) == 0) fail("shuffle whose mask leaves out the calling lane");
  if (source > 31 || (mask >> source & 1) == 0) fail("shuffle from a lane that its mask leaves out");
  self.mask = mask;
  self.lane_mask = lane_mask;
  self.value = value;
  for (unsigned other = 0; other < 32; ++other) {
    if ((mask >> other & 1) == 0 || other == lane) continue;
    const size_t index = warp + other;
    if (index >= m.live) fail("shuffle whose mask names a lane that does not exist");
    const Fiber& fiber = *m.fibers[index];
    if (fiber.state == State::ended) fail("shuffle whose mask names a lane that has ended");
    const bool here = fiber.state == State::at_shuffle;
    if (here && (fiber.mask != mask || fiber.lane_mask != lane_mask) && (fiber.mask >> lane & 1) != 0) {
      fail("divergent shuffle: lanes of one mask wait in different shuffles");
    }
    if (!here || fiber.mask != mask) {
      wait(State::at_shuffle);
      return m.current->received;
    }
  }
  // The last lane of the mask: everyone gets its value.
  for (unsigned other = 0; other < 32; ++other) {
    if ((mask >> other & 1) == 0) continue;
    Fiber& fiber = *m.fibers[warp + other];
    fiber.received = m.fibers[warp + (other ^ unsigned(lane_mask))]->value;
    fiber.state = State::ready;
  }
  return self.received;
}

// Copies take place when they are waited for, as late as the hardware may leave them.
void copy_async(void* to, const void* from, size_t bytes) {
  global_read(from, bytes);
  shared_touch(to, bytes, true, true);
  machine().current->copies.push_back({to, from, bytes});
}

void commit_copies() {
  Fiber& self = *machine().current;
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void wait_copies(size_t newer) {
  Machine& m = machine();
  Fiber& self = *m.current;
  const size_t done = self.groups.size() > newer ? self.groups.size() - newer : 0;
  for (size_t i = 0; i < done; ++i) {
    for (const Copy& copy : self.groups[i]) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      const size_t first = size_t(static_cast<unsigned char*>(copy.to) - m.shared_base) / 4;
      for (size_t word = first; word < first + copy.bytes / 4; ++word) {
        m.words[word].in_flight = false;
        m.words[word].initialised = true;
      }
    }
  }
  self.groups.erase(self.groups.begin(), self.groups.begin() + std::ptrdiff_t(done));
}

void register_range(const void* data, size_t bytes, bool writable) {
  if (data == nullptr || bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  Range range{begin, begin + bytes, writable, {}, {}};
  range.writers.assign(bytes / 2 + 1, nobody);
  range.readers.assign(bytes / 2 + 1, nobody);
  machine().ranges[begin] = std::move(range);
}

void clear_ranges() { machine().ranges.clear(); }

}  // namespace simt
