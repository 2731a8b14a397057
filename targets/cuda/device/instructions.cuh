// The instructions of the hardware that kernels use, a function each, and nothing else of it: kernels are written in
// these and in plain C++. Tests replace this file by one that does the same on a CPU.
#pragma once
#ifdef __CUDACC_RTC__  // has no headers, and knows what is CUDA's own
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cuda_runtime.h>
#include <stdint.h>
#endif

namespace qcompile {

__device__ __forceinline__ int thread() { return threadIdx.x; }
__device__ __forceinline__ int threads() { return blockDim.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }
__device__ __forceinline__ int block_z() { return blockIdx.z; }
__device__ __forceinline__ int blocks_x() { return gridDim.x; }
__device__ __forceinline__ int blocks_y() { return gridDim.y; }
__device__ __forceinline__ int blocks_z() { return gridDim.z; }

// The memory that the threads of a block share, as much as the launch asks for; at 128 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Until every thread of the block is here, and sees what the others wrote.
__device__ __forceinline__ void barrier() { __syncthreads(); }

// What this thread wrote before may be read by the other blocks after what it writes next.
__device__ __forceinline__ void publish() { __threadfence(); }

// How many of the `of` blocks drew before this one; the last one makes the counter zero again. What blocks that drew
// before had published can be read after.
__device__ __forceinline__ int draw_ticket(int* counter, int of) {
  int drawn = int(atomicInc(reinterpret_cast<unsigned*>(counter), unsigned(of - 1)));
  __threadfence();
  return drawn;
}

// What another block has published.
__device__ __forceinline__ int load_published(const int* from) { return __ldcg(from); }

// --- numbers: each exactly as said, so that no compiler may join a product and a sum ----------------------------------

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float to_float(int value) { return __int2float_rn(value); }
__device__ __forceinline__ int round_half_even(float value) { return __float2int_rn(value); }

// --- dot products ---------------------------------------------------------------------------------------------------------

// acc + the sum of four products of signed bytes.
__device__ __forceinline__ int dot4(uint32_t a, uint32_t b, int acc) { return __dp4a(int(a), int(b), acc); }

// Bytes of (a, b), which are numbered 0 to 7, as the four hexadecimal digits of `order` choose, the lowest first.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t order) { return __byte_perm(a, b, order); }

// The larger of each of four signed bytes.
__device__ __forceinline__ uint32_t larger4(uint32_t a, uint32_t b) { return __vmaxs4(a, b); }

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes of a warp call it together.
__device__ __forceinline__ int exchange(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// --- tensor cores ---------------------------------------------------------------------------------------------------------

// Four matrices of 8 rows of 16 bytes; lane i says where row i % 8 of matrix i / 8 lies, at 16 bytes in shared memory.
// Lane i gets word i % 4 of row i / 4 of each. All 32 lanes of a warp call it together.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// sums (16 x 8, int32) += a (16 x 32, int8) * b (32 x 8, int8), exactly. With lane = 4 g + t of a warp:
// a[0], a[1]: rows g, g + 8, bytes 4 t to 4 t + 3; a[2], a[3]: the same of the bytes from 16 on.
// b[0], b[1]: column g, bytes 4 t to 4 t + 3, and from 16 on. sums[0], sums[1]: row g, columns 2 t and 2 t + 1;
// sums[2], sums[3]: row g + 8. All 32 lanes of a warp call it together.
__device__ __forceinline__ void matrix_multiply_add(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
  // Turing multiplies 8 x 16 by 16 x 8; the words lie as those of the larger shape do.
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(sums[0]), "+r"(sums[1]) : "r"(a[0]), "r"(b0));
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(sums[2]), "+r"(sums[3]) : "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(sums[0]), "+r"(sums[1]) : "r"(a[2]), "r"(b1));
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(sums[2]), "+r"(sums[3]) : "r"(a[3]), "r"(b1));
#endif
}

// --- copies from global to shared memory -----------------------------------------------------------------------------------

// Copy BYTES (4, 8 or 16) to where as many may lie, or zeros where `take` is false. The bytes are there after
// `wait_for_copies` and a barrier; before sm_80, at once.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool take) {
#if __CUDA_ARCH__ >= 800
  uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  int bytes = take ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(BYTES), "r"(bytes) : "memory");
#else
  if constexpr (BYTES == 16)
    *static_cast<uint4*>(shared) = take ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  else if constexpr (BYTES == 8)
    *static_cast<uint2*>(shared) = take ? *static_cast<const uint2*>(global) : make_uint2(0, 0);
  else
    *static_cast<uint32_t*>(shared) = take ? *static_cast<const uint32_t*>(global) : 0;
#endif
}

// The end of a group of copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last GROUPS groups of this thread's copies are done.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

}  // namespace qcompile
