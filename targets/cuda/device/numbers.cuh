// From an accumulator to a stored activation: the contract of qcompile.arith. A product meets a sum only where the
// contract says so, as one fused multiply-add.
#pragma once
#include "instructions.cuh"

namespace qcompile {

// The numbers of one requantize; the clamp is relative to the zero point.
struct Requantize {
  int zero_point;
  float lo, hi;
  float other_m;
  int other_zero_point;
};

__device__ __forceinline__ int finish(float real, const Requantize& to) {
  return round_half_even(fminf(fmaxf(real, to.lo), to.hi)) + to.zero_point;
}

__device__ __forceinline__ int requantize(int sum, float m, const Requantize& to) {
  return finish(multiply(to_float(sum), m), to);
}

// The same with a residual, a stored activation of another scale.
__device__ __forceinline__ int requantize(int sum, float m, int residual, const Requantize& to) {
  float other = to_float(residual - to.other_zero_point);
  return finish(fused_multiply_add(other, to.other_m, multiply(to_float(sum), m)), to);
}

// float32 -> stored activation: NaN becomes the zero point.
__device__ __forceinline__ int quantize(float value, float inverse_scale, const Requantize& to) {
  float real = value != value ? 0.0f : multiply(value, inverse_scale);
  return finish(real, to);
}

// Modulo 2^32: a bias that zero points were folded into may be far from the sum that it corrects.
__device__ __forceinline__ int wrapping_add(int a, int b) { return int(uint32_t(a) + uint32_t(b)); }

// Four bytes in one word.
__device__ __forceinline__ uint32_t pack4(int a, int b, int c, int d) {
  return uint32_t(a & 255) | uint32_t(b & 255) << 8 | uint32_t(c & 255) << 16 | uint32_t(d) << 24;
}

// Byte i of a word, with its sign.
__device__ __forceinline__ int byte_of(uint32_t word, int i) { return int8_t(word >> (8 * i)); }

}  // namespace qcompile
