// A launch: all blocks of a grid one after the other, and the entry of a kernel that takes its parameters by address.
//
// A library of kernels exports, besides `qcompile_launch`, for each `QCOMPILE_KERNEL(NAME)`:
//   void NAME_launch(void** parameters)     calls NAME with *parameters[0], *parameters[1], ...; within a launch
//   const int NAME_parameter_sizes[]        their sizes in bytes, and 0
//   const bool NAME_parameter_pointers[]    which of them are pointers
#pragma once
#include <limits.h>
#include <pthread.h>
#include <signal.h>

#include <array>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <utility>

#include "block.h"

namespace qcompile::emulated {

template <class... P, size_t... I>
inline void call(void (*kernel)(P...), void** parameters, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<P>*>(parameters[I])...);
}

template <class... P>
inline void call(void (*kernel)(P...), void** parameters) {
  call(kernel, parameters, std::index_sequence_for<P...>());
}

template <class... P>
constexpr std::array<int, sizeof...(P) + 1> sizes(void (*)(P...)) {
  return {int(sizeof(P))..., 0};
}

template <class... P>
constexpr std::array<bool, sizeof...(P) + 1> pointers(void (*)(P...)) {
  return {std::is_pointer_v<P>..., false};
}

// Where a thread begins. Its stack has nothing to return to.
[[noreturn]] inline void run_thread() {
  block.kernel(block.parameters);
  complete_copies(INT_MAX);
  Warp& lanes = warp();
  lanes.alive &= ~(1u << (block.current & 31));
  lanes.ready &= lanes.alive;
  block.alive--;
  void* ended;
  int next = lanes.ready != 0 ? (block.current & ~31) + pick(lanes.ready) : elsewhere();
  if (next >= 0) block.current = next;
  qcompile_switch(&ended, next >= 0 ? block.stacks[next] : block.host);
  abort();
}

// Stacks, kept from launch to launch. They begin at different lines of the cache, and end in a pattern.
struct Stacks {
  static constexpr uint64_t pattern = 0x5b5b5b5b5b5b5b5bu;
  char* memory = static_cast<char*>(mmap(nullptr, size_t(max_threads) * stack_bytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  ~Stacks() { munmap(memory, size_t(max_threads) * stack_bytes); }
  uint64_t& end(int thread) { return *reinterpret_cast<uint64_t*>(memory + size_t(thread) * stack_bytes); }
  void* begin(int thread) {
    end(thread) = pattern;
    void** top = reinterpret_cast<void**>(memory + size_t(thread + 1) * stack_bytes - thread % 24 * 320);
    void** bottom = top - 8;  // six registers, where to go on, and an address that is none
    for (int i = 0; i < 8; i++) bottom[i] = nullptr;
    bottom[6] = reinterpret_cast<void*>(&run_thread);
    return bottom;
  }
};

inline void run_block(Stacks& stacks, int x, int y, int z) {
  block.index[0] = x;
  block.index[1] = y;
  block.index[2] = z;
  block.alive = block.threads;
  block.at_barrier = 0;
  poison(block.shared, block.shared_bytes, block.random);
  block.turn = uint32_t(block.random.next());
  for (int i = 0; i < block.threads; i++) {
    block.stacks[i] = stacks.begin(i);
    block.copies[i].clear();
    block.committed[i] = 0;
  }
  for (int i = 0; i * 32 < block.threads; i++) {
    int lanes = block.threads - i * 32;
    block.warps[i].alive = block.warps[i].ready = lanes < 32 ? (1u << lanes) - 1 : ~0u;
    block.warps[i].waiting = 0;
  }
  block.current = 0;
  block.current = elsewhere();
  qcompile_switch(&block.host, block.stacks[block.current]);
}

// While it lives, a kernel that touches memory it may not ends its launch, and not the process.
class Faults {
 public:
  Faults() {
    launching = pthread_self();
    struct sigaction action = {};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // it does not return
    sigaction(SIGSEGV, &action, &before);
  }
  ~Faults() { sigaction(SIGSEGV, &before, nullptr); }

 private:
  static void handle(int, siginfo_t* info, void*) {
    if (pthread_equal(pthread_self(), launching)) fail("a read or write at %p, where it may not", info->si_addr);
    sigaction(SIGSEGV, &before, nullptr);  // another thread: the instruction faults again, as if this were not here
  }
  static inline pthread_t launching;
  static inline struct sigaction before;
};

// Run `kernel`, a NAME_launch, on every block of the grid, in a random order. Returns what went wrong, or nullptr.
inline const char* launch(void (*kernel)(void**), const int (&grid)[3], int threads, int shared_bytes,
                          void** parameters) {
  static std::mutex one_at_a_time;
  static Stacks stacks;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  size_t blocks = size_t(grid[0]) * grid[1] * grid[2];
  Guarded shared(shared_bytes, 128);
  block.message[0] = 0;
  if (blocks == 0 || grid[1] > 65535 || grid[2] > 65535) return "a grid of no blocks or too many";
  if (threads < 1 || threads > max_threads) return "a block of no threads or more than 1024";
  if (shared.data() == nullptr) return "no memory";
  block.kernel = kernel;
  block.parameters = parameters;
  block.threads = threads;
  block.shared = shared.data();
  block.shared_bytes = shared_bytes;
  memcpy(block.grid, grid, sizeof grid);
  static bool seeded = false;
  if (const char* seed = getenv("QCOMPILE_EMULATED_SEED"); seed != nullptr && !seeded)
    block.random.state ^= strtoull(seed, nullptr, 10) << 20;
  seeded = true;

  Faults faults;
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = 0; i < blocks && block.message[0] == 0; i++) {
    std::swap(order[i], order[i + block.random.below(blocks - i)]);
    uint32_t at = order[i];
    run_block(stacks, at % grid[0], at / grid[0] % grid[1], at / grid[0] / grid[1]);
  }
  if (block.message[0] != 0) return block.message;
  for (int i = 0; i < threads; i++)
    if (stacks.end(i) != Stacks::pattern) return "the stack of a thread overflowed";
  return shared.intact() ? nullptr : "a write beyond the shared memory";
}

}  // namespace qcompile::emulated

#define QCOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

QCOMPILE_EXPORT inline __attribute__((used)) const char* qcompile_launch(
    void (*kernel)(void**), int x, int y, int z, int threads, int shared_bytes, void** parameters) {
  return qcompile::emulated::launch(kernel, {x, y, z}, threads, shared_bytes, parameters);
}

// Memory for arrays of a launch, watched (guarded.h); freeing it says whether nothing was written around it.
namespace qcompile::emulated {
inline std::vector<std::unique_ptr<Guarded>> arrays;
}
QCOMPILE_EXPORT inline __attribute__((used)) void* qcompile_allocate(size_t bytes) {
  using namespace qcompile::emulated;
  arrays.push_back(std::make_unique<Guarded>(bytes, 16));
  return arrays.back()->data();
}
QCOMPILE_EXPORT inline __attribute__((used)) int qcompile_free(void* memory) {
  using namespace qcompile::emulated;
  for (size_t i = 0; i < arrays.size(); i++)
    if (arrays[i]->data() == memory) {
      bool intact = arrays[i]->intact();
      arrays.erase(arrays.begin() + i);
      return intact;
    }
  return 0;
}

#define QCOMPILE_KERNEL(NAME) \
  QCOMPILE_EXPORT void NAME##_launch(void** parameters) { qcompile::emulated::call(NAME, parameters); } \
  QCOMPILE_CONSTANT(NAME##_parameter_sizes, qcompile::emulated::sizes(NAME)) \
  QCOMPILE_CONSTANT(NAME##_parameter_pointers, qcompile::emulated::pointers(NAME))
#define QCOMPILE_CONSTANT(NAME, VALUE) \
  QCOMPILE_EXPORT const decltype(VALUE) NAME; \
  const decltype(VALUE) NAME = VALUE;

// --- what the compiler calls where a load or store is not aligned, or an index is outside an array -------------------

namespace qcompile::emulated {
struct Checked {  // how what -fsanitize of GCC hands over begins
  const char* file;
  uint32_t line, column;
};
}  // namespace qcompile::emulated

extern "C" {
inline __attribute__((used, noinline)) void __ubsan_handle_type_mismatch_v1_abort(void* data, void* address) {
  auto* checked = static_cast<qcompile::emulated::Checked*>(data);
  qcompile::emulated::Place place = {checked->file, int(checked->line)};
  qcompile::emulated::fail("%s: %p is not aligned for its type", qcompile::emulated::name(place), address);
}

inline __attribute__((used, noinline)) void __ubsan_handle_out_of_bounds_abort(void* data, void* index) {
  auto* checked = static_cast<qcompile::emulated::Checked*>(data);
  qcompile::emulated::Place place = {checked->file, int(checked->line)};
  qcompile::emulated::fail("%s: index %td is outside the array", qcompile::emulated::name(place),
                           reinterpret_cast<ptrdiff_t>(index));
}
}
