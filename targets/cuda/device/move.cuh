// Moving values between layouts, and in and out of float.
#pragma once
#include "image.cuh"
#include "numbers.cuh"

namespace qcompile {

// A walk over the indices of up to six dimensions; positions are sums of index times step.
struct Move {
  int extent[6];
  int from[6], to[6];        // steps
  int from_first, to_first;  // positions of the first element
  Image y;
  Margin margin;
  int zero_point;            // of x, where the numbers change
  float factor;
  Requantize requantized;
};

struct Same {
  template <class T>
  static __device__ __forceinline__ T convert(T value, const Move&) { return value; }
};

struct Quantized {
  static __device__ __forceinline__ int8_t convert(float value, const Move& c) {
    return int8_t(quantize(value, c.factor, c.requantized));
  }
};

struct Dequantized {
  static __device__ __forceinline__ float convert(int8_t value, const Move& c) {
    return multiply(to_float(value - c.zero_point), c.factor);
  }
};

struct Rescaled {
  static __device__ __forceinline__ int8_t convert(int8_t value, const Move& c) {
    return int8_t(requantize(value - c.zero_point, c.factor, c.requantized));
  }
};

template <class X, class Y, class Convert>
__device__ __forceinline__ void move(const X* x, Y* y, const Move& c) {
  int64_t count = 1;
#pragma unroll
  for (int d = 0; d < 6; d++) count *= c.extent[d];
  for (int64_t i = int64_t(block_x()) * threads() + thread(); i < count; i += int64_t(blocks_x()) * threads()) {
    int64_t rest = i, from = c.from_first, to = c.to_first;
#pragma unroll
    for (int d = 5; d >= 0; d--) {
      int64_t above = rest / c.extent[d];
      int index = int(rest - above * c.extent[d]);
      rest = above;
      from += int64_t(index) * c.from[d];
      to += int64_t(index) * c.to[d];
    }
    y[to] = Convert::convert(x[from], c);
  }
  if constexpr (sizeof(Y) == 1) c.margin.fill(reinterpret_cast<int8_t*>(y), c.y);
}

struct Fill {
  int64_t count;
  int value;
};

__device__ __forceinline__ void fill(int8_t* y, const Fill& c) {
  for (int64_t i = int64_t(block_x()) * threads() + thread(); i < c.count; i += int64_t(blocks_x()) * threads())
    y[i] = int8_t(c.value);
}

struct Planes {
  int images, channels;  // at most four
  float inverse_scale;
  Image y;
  Margin margin;
  Requantize to;
};

// A float image, a plane for each channel, to pixels of four bytes.
__device__ __forceinline__ void quantize_planes(const float* x, int8_t* y, const Planes& c) {
  int64_t plane = int64_t(c.y.height) * c.y.width, count = c.images * plane;
  for (int64_t i = int64_t(block_x()) * threads() + thread(); i < count; i += int64_t(blocks_x()) * threads()) {
    int64_t n = i / plane, at = i - n * plane;
    int value[4] = {};
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (k < c.channels) value[k] = quantize(x[(n * c.channels + k) * plane + at], c.inverse_scale, c.to);
    reinterpret_cast<uint32_t*>(y)[c.y.pixel(int(n), int(at / c.y.width), int(at % c.y.width))] =
        pack4(value[0], value[1], value[2], value[3]);
  }
  c.margin.fill(y, c.y);
}

}  // namespace qcompile
