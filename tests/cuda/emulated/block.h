// A block of threads on a CPU. Each thread is a fiber with a stack of its own; one runs until it waits for others.
//
// Which runs next is random, but within a warp as long as one of it can: warps run ahead of each other as far as
// the barriers let them, and a barrier that is missing shows as wrong results.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <string>

#include "guarded.h"

namespace qcompile::emulated {

// Go on where the stack `to` left off; `from` gets the place to come back to here.
extern "C" __attribute__((visibility("hidden"))) void qcompile_switch(void** from, void* to);
asm(R"(
  .text
  .p2align 4
  .type qcompile_switch, @function
qcompile_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
  .size qcompile_switch, .-qcompile_switch
)");

struct Place {
  const char* file;
  int line;
};

// A copy that was asked for: the bytes come when its thread waits for its group.
struct Copy {
  void* shared;
  const void* global;  // nullptr: zeros
  int bytes, group;
};

// What the lanes of a warp bring to an instruction that they execute together, and what they take away.
struct Warp {
  uint32_t alive, ready, waiting;  // lanes, a bit each
  const char* kind;                // of the instruction that they wait in
  Place place;
  const char* rows[32];
  int values[32], masks[32];
  alignas(32) uint32_t words[32][4];
  alignas(32) int8_t a[2][2][8][16];  // rows from 0 and 8, bytes from 0 and 16, row, byte
  alignas(32) int8_t b[2][8][16];     // bytes from 0 and 16, column, byte
  alignas(32) int sums[2][8][8];      // rows from 0 and 8, row, column
};

constexpr int max_threads = 1024, stack_bytes = 1 << 16;

struct Block {
  int current;  // the thread that runs
  int threads, alive, at_barrier;
  Place barrier;
  int index[3], grid[3];
  char* shared;
  int shared_bytes;
  void (*kernel)(void**);
  void** parameters;
  Random random;
  uint32_t turn;
  void *host, *stacks[max_threads];
  Warp warps[max_threads / 32];
  std::vector<Copy> copies[max_threads];
  int committed[max_threads];
  char message[1000];
};
inline Block block;

inline Warp& warp() { return block.warps[block.current / 32]; }

// End the launch: what is wrong, and the thread that found it.
[[noreturn, gnu::cold, gnu::noinline, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  int length = vsnprintf(block.message, sizeof block.message, format, values);
  va_end(values);
  if (length < int(sizeof block.message))
    snprintf(block.message + length, sizeof block.message - length, " (block %d, %d, %d, thread %d)", block.index[0],
             block.index[1], block.index[2], block.current);
  void* abandoned;
  qcompile_switch(&abandoned, block.host);
  abort();
}

inline const char* name(Place place) {
  static char text[300];
  const char* slash = strrchr(place.file, '/');
  snprintf(text, sizeof text, "%s:%d", slash != nullptr ? slash + 1 : place.file, place.line);
  return text;
}

inline int pick(uint32_t lanes) {
  uint32_t turn = (block.turn += 0x9E3779B9u) >> 27;
  return (__builtin_ctz(lanes >> turn | lanes << (-turn & 31)) + turn) & 31;
}

// A thread that can run, where the warp of the last one has none; -1: all have ended.
[[gnu::noinline]] inline int elsewhere() {
  if (const Warp& stuck = warp(); stuck.waiting != 0)
    fail("%s at %s waits for all 32 lanes of warp %d, but %d have ended or wait elsewhere", stuck.kind,
         name(stuck.place), block.current / 32, 32 - __builtin_popcount(stuck.waiting));
  int warps = (block.threads + 31) / 32;
  if (block.at_barrier == block.threads) {
    block.at_barrier = 0;
    for (int i = 0; i < warps; i++) block.warps[i].ready = block.warps[i].alive;
  }
  for (int i = 0, start = int(block.random.below(warps)); i < warps; i++) {
    int chosen = (start + i) % warps;
    if (block.warps[chosen].ready != 0) return chosen * 32 + pick(block.warps[chosen].ready);
  }
  if (block.alive == 0) return -1;
  fail("barrier at %s: %d threads wait, %d have ended", name(block.barrier), block.at_barrier,
       block.threads - block.alive);
}

// Let another thread run, until this one is ready again.
inline void suspend() {
  uint32_t ready = warp().ready;
  int from = block.current;
  int next = __builtin_expect(ready != 0, 1) ? (from & ~31) + pick(ready) : elsewhere();
  block.current = next;
  if (next != from) qcompile_switch(&block.stacks[from], block.stacks[next]);
}

inline void wait_at_barrier(Place place) {
  if (block.at_barrier++ == 0) block.barrier = place;
  if (block.barrier.line != place.line || strcmp(block.barrier.file, place.file) != 0) {
    std::string other = name(block.barrier);
    fail("barriers at %s and %s wait for each other", other.c_str(), name(place));
  }
  warp().ready &= ~(1u << (block.current & 31));
  suspend();
}

// A lane has brought its operands. Once all have, one computes the results of all; each then finds its own.
template <class Compute>
inline void together(const char* kind, Place place, const Compute& compute) {
  Warp& lanes = warp();
  uint32_t lane = 1u << (block.current & 31);
  if (lanes.waiting == 0) {
    lanes.kind = kind;
    lanes.place = place;
  } else if (lanes.place.line != place.line || lanes.kind != kind) {
    std::string other = name(lanes.place);
    fail("lanes of warp %d are in %s at %s and in %s at %s", block.current / 32, lanes.kind, other.c_str(), kind,
         name(place));
  }
  lanes.waiting |= lane;
  if (lanes.waiting == ~0u) {
    compute(lanes);
    lanes.waiting = 0;
    lanes.ready = ~0u;
  } else {
    lanes.ready &= ~lane;
    suspend();
  }
}

// `bytes` of shared memory at a multiple of as many.
inline void check_shared(const char* kind, const void* at, int bytes, Place place) {
  ptrdiff_t offset = static_cast<const char*>(at) - block.shared;
  if (offset < 0 || offset > block.shared_bytes - bytes)
    fail("%s at %s: byte %td of %d bytes of shared memory", kind, name(place), offset, block.shared_bytes);
  if (offset % bytes != 0) fail("%s at %s: byte %td is not at a multiple of %d", kind, name(place), offset, bytes);
}

// Do the copies of the groups before `group`.
inline void complete_copies(int group) {
  std::vector<Copy>& copies = block.copies[block.current];
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < group; done++) {
    const Copy& copy = copies[done];
    if (copy.global == nullptr)
      memset(copy.shared, 0, copy.bytes);
    else
      memcpy(copy.shared, copy.global, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + done);
}

}  // namespace qcompile::emulated
