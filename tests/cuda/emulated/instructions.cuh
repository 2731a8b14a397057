// The functions of targets/cuda/device/instructions.cuh, on a CPU. Found in place of it, it also makes the launch.
#pragma once
#include <immintrin.h>
#include <limits.h>
#include <math.h>

#include <string>

#include "block.h"
#include "language.h"
#include "launch.h"

// The caller's place in the source, for messages.
#define QCOMPILE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace qcompile {

inline int thread() { return emulated::block.current; }
inline int threads() { return emulated::block.threads; }
inline int block_x() { return emulated::block.index[0]; }
inline int block_y() { return emulated::block.index[1]; }
inline int block_z() { return emulated::block.index[2]; }
inline int blocks_x() { return emulated::block.grid[0]; }
inline int blocks_y() { return emulated::block.grid[1]; }
inline int blocks_z() { return emulated::block.grid[2]; }

inline char* shared_memory() { return emulated::block.shared; }

inline void barrier(QCOMPILE_HERE) { emulated::wait_at_barrier({file, line}); }

inline void publish() {}
inline int draw_ticket(int* counter, int of) {
  int drawn = *counter;
  *counter = drawn == of - 1 ? 0 : drawn + 1;
  return drawn;
}
inline int load_published(const int* from) { return *from; }

// --- numbers (compiled with -ffp-contract=off) -----------------------------------------------------------------------

inline float multiply(float a, float b) { return a * b; }
inline float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline float to_float(int value) { return float(value); }
inline int round_half_even(float value) {
  if (value != value) return 0;
  if (value >= 2147483648.0f) return INT_MAX;
  if (value < -2147483648.0f) return INT_MIN;
  return int(lrintf(value));
}

// --- dot products ----------------------------------------------------------------------------------------------------

inline int dot4(uint32_t a, uint32_t b, int acc) {
  for (int i = 0; i < 32; i += 8) acc += int8_t(a >> i) * int8_t(b >> i);
  return acc;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t order, QCOMPILE_HERE) {
  if ((order & 0xffff8888u) != 0) emulated::fail("permute at %s: order %#x", emulated::name({file, line}), order);
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(bytes >> (order >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline uint32_t larger4(uint32_t a, uint32_t b) {
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epi8(_mm_cvtsi32_si128(int(a)), _mm_cvtsi32_si128(int(b)))));
}

[[gnu::noinline]] inline int exchange(int value, int mask, QCOMPILE_HERE) {
  emulated::Warp& warp = emulated::warp();
  int lane = thread() & 31;
  if (mask < 0 || mask > 31) emulated::fail("exchange at %s: mask %d", emulated::name({file, line}), mask);
  warp.values[lane] = value;
  warp.masks[lane] = mask;
  emulated::together("exchange", {file, line}, [](emulated::Warp& lanes) {
    int values[32];
    memcpy(values, lanes.values, sizeof values);
    for (int i = 0; i < 32; i++) lanes.values[i] = values[i ^ lanes.masks[i]];
  });
  return warp.values[lane];
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

[[gnu::noinline]] inline void load_matrices(uint32_t (&words)[4], const void* row, QCOMPILE_HERE) {
  emulated::check_shared("load_matrices", row, 16, {file, line});
  emulated::Warp& warp = emulated::warp();
  int lane = thread() & 31;
  warp.rows[lane] = static_cast<const char*>(row);
  emulated::together("load_matrices", {file, line}, [](emulated::Warp& lanes) {
    for (int i = 0; i < 32; i++)
      for (int matrix = 0; matrix < 4; matrix++)
        memcpy(&lanes.words[i][matrix], lanes.rows[matrix * 8 + i / 4] + i % 4 * 4, 4);
  });
  memcpy(words, warp.words[lane], sizeof words);
}

namespace emulated {

// Pairs of the numbers of 8 columns, sign-extended: what one product-and-sum instruction takes of b, for each pair.
inline void pair_columns(__m256i (&pairs)[8], const int8_t (&columns)[8][16]) {
  __m256i x[8], y[8];
  for (int i = 0; i < 8; i++)
    x[i] = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(columns[i])));
  for (int i = 0; i < 8; i += 4)  // a transposition of 8 x 8 words of 32 bits
    for (int j = 0; j < 2; j++) {
      y[i + 2 * j] = _mm256_unpacklo_epi32(x[i + j * 2], x[i + j * 2 + 1]);
      y[i + 2 * j + 1] = _mm256_unpackhi_epi32(x[i + j * 2], x[i + j * 2 + 1]);
    }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm256_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm256_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    pairs[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
    pairs[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
  }
}

inline void multiply_add(Warp& lanes) {
  __m256i b[2][8];
  for (int k = 0; k < 2; k++) pair_columns(b[k], lanes.b[k]);
  for (int half = 0; half < 2; half++)
    for (int row = 0; row < 8; row++) {
      __m256i* sums = reinterpret_cast<__m256i*>(lanes.sums[half][row]);
      __m256i acc = _mm256_load_si256(sums);
      for (int k = 0; k < 2; k++) {
        alignas(32) int a[8];
        const __m128i* bytes = reinterpret_cast<const __m128i*>(lanes.a[half][k][row]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(a), _mm256_cvtepi8_epi16(_mm_load_si128(bytes)));
        for (int pair = 0; pair < 8; pair++)
          acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_set1_epi32(a[pair]), b[k][pair]));
      }
      _mm256_store_si256(sums, acc);
    }
}

}  // namespace emulated

[[gnu::noinline]] inline void matrix_multiply_add(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                  QCOMPILE_HERE) {
  emulated::Warp& warp = emulated::warp();
  int g = thread() / 4 % 8, t = thread() % 4;
  for (int i = 0; i < 4; i++) memcpy(&warp.a[i % 2][i / 2][g][4 * t], &a[i], 4);
  memcpy(&warp.b[0][g][4 * t], &b0, 4);
  memcpy(&warp.b[1][g][4 * t], &b1, 4);
  for (int i = 0; i < 2; i++) memcpy(&warp.sums[i][g][2 * t], &sums[2 * i], 8);
  emulated::together("matrix_multiply_add", {file, line}, emulated::multiply_add);
  for (int i = 0; i < 2; i++) memcpy(&sums[2 * i], &warp.sums[i][g][2 * t], 8);
}

// --- copies from global to shared memory -----------------------------------------------------------------------------

template <int BYTES>
inline void copy_async(void* shared, const void* global, bool take, QCOMPILE_HERE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulated::Block& block = emulated::block;
  emulated::check_shared("copy_async", shared, BYTES, {file, line});
  if (take && reinterpret_cast<uintptr_t>(global) % BYTES != 0)
    emulated::fail("copy_async at %s: %p is not at a multiple of %d", emulated::name({file, line}), global, BYTES);
  for (int i = 0; i < BYTES; i += 4) {  // until the bytes come
    uint32_t garbage = uint32_t(block.random.next());
    memcpy(static_cast<char*>(shared) + i, &garbage, 4);
  }
  block.copies[block.current].push_back({shared, take ? global : nullptr, BYTES, block.committed[block.current]});
}

inline void commit_copies() { emulated::block.committed[thread()]++; }

template <int GROUPS>
inline void wait_for_copies() {
  emulated::complete_copies(emulated::block.committed[thread()] - GROUPS);
}

}  // namespace qcompile
