// Elementwise operators on activations: add (and subtract), multiply, table lookup. A thread computes four channels.
#pragma once
#include "image.cuh"
#include "numbers.cuh"

namespace qcompile {

// Where an operand lies: bytes from image to image and so on; zero where it is repeated. `channel` is 0 or 1.
struct Operand {
  int first, image, line, column, channel;

  __device__ __forceinline__ void load(const int8_t* from, int n, int h, int w, int word, int (&values)[4]) const {
    const int8_t* place = from + first + int64_t(n) * image + int64_t(h) * line + int64_t(w) * column;
    uint32_t four = channel ? *reinterpret_cast<const uint32_t*>(place + word * 4) : uint32_t(*place & 255) * 0x01010101u;
#pragma unroll
    for (int k = 0; k < 4; k++) values[k] = byte_of(four, k);
  }
};

struct Binary {
  int images, channels;  // channels of y, a multiple of four
  Operand a, b;
  int a_zero_point;
  float a_m;
  Image y;
  Margin margin;
  Requantize to;         // with the zero point and multiplier of b as the other's
};

struct Add {
  static __device__ __forceinline__ int compute(int a, int b, const Binary& c) {
    float product = multiply(to_float(a - c.a_zero_point), c.a_m);
    return finish(fused_multiply_add(to_float(b - c.to.other_zero_point), c.to.other_m, product), c.to);
  }
};

struct Multiply {
  static __device__ __forceinline__ int compute(int a, int b, const Binary& c) {
    return requantize((a - c.a_zero_point) * (b - c.to.other_zero_point), c.a_m, c.to);
  }
};

template <class Operation>
__device__ __forceinline__ void binary(const int8_t* a, const int8_t* b, int8_t* y, const Binary& c) {
  each_word(c.images, c.channels, c.y, [&](int n, int h, int w, int word) {
    int left[4], right[4], value[4];
    c.a.load(a, n, h, w, word, left);
    c.b.load(b, n, h, w, word, right);
#pragma unroll
    for (int k = 0; k < 4; k++) value[k] = Operation::compute(left[k], right[k], c);
    *reinterpret_cast<uint32_t*>(y + c.y.offset(n, h, w) + word * 4) = pack4(value[0], value[1], value[2], value[3]);
  });
  c.margin.fill(y, c.y);
}

struct Lookup {
  int images, channels;     // channels of y, a multiple of four
  int tables, table_step;   // how many tables there are, a row of 256 each; from channel to channel
  Image x, y;
  Margin margin;
};

__device__ __forceinline__ void lookup(const int8_t* x, const int8_t* table, int8_t* y, const Lookup& c) {
  each_word(c.images, c.channels, c.y, [&](int n, int h, int w, int word) {
    uint32_t four = *reinterpret_cast<const uint32_t*>(x + c.x.offset(n, h, w) + word * 4);
    int value[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      int row = (word * 4 + k) * c.table_step;
      value[k] = table[(row < c.tables ? row : 0) * 256 + byte_of(four, k) + 128];
    }
    *reinterpret_cast<uint32_t*>(y + c.y.offset(n, h, w) + word * 4) = pack4(value[0], value[1], value[2], value[3]);
  });
  c.margin.fill(y, c.y);
}

}  // namespace qcompile
