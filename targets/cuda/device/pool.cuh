// Pooling: the maximum over a window, and averages over fixed or adaptive windows. A thread computes four channels of
// a pixel.
#pragma once
#include "image.cuh"
#include "numbers.cuh"

namespace qcompile {

struct Pool {
  int images, channels;  // channels of y, a multiple of four
  int filter_height, filter_width, stride_down, stride_right, padding_top, padding_left, dilation_down, dilation_right;
  Image x, y;
  Margin margin;
};

// Padding is never a value: a window that holds nothing else gives the least.
__device__ __forceinline__ void max_pool(const int8_t* x, int8_t* y, const Pool& c) {
  each_word(c.images, c.channels, c.y, [&](int n, int h, int w, int word) {
    uint32_t best = 0x80808080u;
    for (int row = 0; row < c.filter_height; row++) {
      int from_row = h * c.stride_down - c.padding_top + row * c.dilation_down;
      if (from_row < 0 || from_row >= c.x.height) continue;
      for (int column = 0; column < c.filter_width; column++) {
        int from_column = w * c.stride_right - c.padding_left + column * c.dilation_right;
        if (from_column < 0 || from_column >= c.x.width) continue;
        best = larger4(best, *reinterpret_cast<const uint32_t*>(x + c.x.offset(n, from_row, from_column) + word * 4));
      }
    }
    *reinterpret_cast<uint32_t*>(y + c.y.offset(n, h, w) + word * 4) = best;
  });
  c.margin.fill(y, c.y);
}

struct Average {
  int images, channels;
  int x_zero_point;
  Image x, y;
  Margin margin;
  Requantize to;
};

// rows, columns: the first and one past the last of each window, inside the image. m: (rows, columns) of y.
__device__ __forceinline__ void average_pool(
    const int8_t* x, const int* rows, const int* columns, const float* m, int8_t* y, const Average& c) {
  each_word(c.images, c.channels, c.y, [&](int n, int h, int w, int word) {
    int top = rows[2 * h], bottom = rows[2 * h + 1], left = columns[2 * w], right = columns[2 * w + 1];
    int sums[4] = {};
    for (int row = top; row < bottom; row++)
      for (int column = left; column < right; column++) {
        uint32_t four = *reinterpret_cast<const uint32_t*>(x + c.x.offset(n, row, column) + word * 4);
#pragma unroll
        for (int k = 0; k < 4; k++) sums[k] += byte_of(four, k);
      }
    int surplus = c.x_zero_point * (bottom - top) * (right - left), value[4];
#pragma unroll
    for (int k = 0; k < 4; k++) value[k] = requantize(sums[k] - surplus, m[h * c.y.width + w], c.to);
    *reinterpret_cast<uint32_t*>(y + c.y.offset(n, h, w) + word * 4) = pack4(value[0], value[1], value[2], value[3]);
  });
  c.margin.fill(y, c.y);
}

}  // namespace qcompile
