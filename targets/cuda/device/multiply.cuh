// The product of two tiles in shared memory, added to the sums that a warp holds, by tensor cores or by dot products.
//
// A tile has rows of 64 bytes in four chunks of 16; chunk i of row r lies at chunk i ^ (r / 2 % 4), so that the rows
// that a warp reads at once are in different banks. Lane 4 g + t holds of each 16 x 8 sums those of rows g and g + 8,
// columns 2 t and 2 t + 1.
#pragma once
#include "instructions.cuh"

namespace qcompile {

constexpr int DEPTH = 64;   // bytes of a row of a tile
constexpr int CHUNK = 16;   // bytes that are copied at once
constexpr int CHUNKS = DEPTH / CHUNK;

__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * DEPTH + ((chunk ^ (row >> 1 & 3)) * CHUNK); }

// A lane reads `a` and `b` from places of its own on, which lie in the first rows of the warp. The same of eight rows
// further down is in the same chunk; and a place ^ (i * CHUNK) is that of the chunk whose number is ^ i.
struct TensorCores {
  static __device__ __forceinline__ int place_a(int row) {
    int lane = thread() & 31;
    return chunk_at(row + (lane & 15), lane >> 4);
  }
  static __device__ __forceinline__ int place_b(int column) {
    int lane = thread() & 31;
    return chunk_at(column + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  }

  // sums (16 TALL x 8 WIDE) += rows of `a` * rows of `b`, those of this warp.
  template <int TALL, int WIDE>
  static __device__ __forceinline__ void multiply(
      int (&sums)[TALL][WIDE][4], const char* a, int place_a, const char* b, int place_b) {
    static_assert(WIDE % 2 == 0, "rows of b are read sixteen at a time");
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
      const char *from_a = a + (place_a ^ chunk * CHUNK), *from_b = b + (place_b ^ chunk * CHUNK);
      uint32_t left[TALL][4];
#pragma unroll
      for (int i = 0; i < TALL; i++) load_matrices(left[i], from_a + 16 * i * DEPTH);
#pragma unroll
      for (int j = 0; j < WIDE; j += 2) {
        uint32_t right[4];
        load_matrices(right, from_b + 8 * j * DEPTH);
#pragma unroll
        for (int i = 0; i < TALL; i++) {
          matrix_multiply_add(sums[i][j], left[i], right[0], right[1]);
          matrix_multiply_add(sums[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }
};

struct DotProducts {
  static __device__ __forceinline__ int place_a(int row) { return chunk_at(row + (thread() >> 2 & 7), 0); }
  static __device__ __forceinline__ int place_b(int column) { return chunk_at(column + 2 * (thread() & 3), 0); }

  template <int TALL, int WIDE>
  static __device__ __forceinline__ void multiply(
      int (&sums)[TALL][WIDE][4], const char* a, int place_a, const char* b, int place_b) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const char *from_a = a + (place_a ^ chunk * CHUNK), *from_b = b + (place_b ^ chunk * CHUNK);
      uint4 left[TALL][2];
#pragma unroll
      for (int i = 0; i < TALL; i++)
#pragma unroll
        for (int k = 0; k < 2; k++) left[i][k] = *reinterpret_cast<const uint4*>(from_a + (16 * i + 8 * k) * DEPTH);
#pragma unroll
      for (int j = 0; j < WIDE; j++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          uint4 right = *reinterpret_cast<const uint4*>(from_b + (8 * j + k) * DEPTH);
#pragma unroll
          for (int i = 0; i < TALL; i++) {
            sums[i][j][k] = dot16(left[i][0], right, sums[i][j][k]);
            sums[i][j][2 + k] = dot16(left[i][1], right, sums[i][j][2 + k]);
          }
        }
    }
  }

  static __device__ __forceinline__ int dot16(const uint4& a, const uint4& b, int sum) {
    return dot4(a.w, b.w, dot4(a.z, b.z, dot4(a.y, b.y, dot4(a.x, b.x, sum))));
  }
};

}  // namespace qcompile
