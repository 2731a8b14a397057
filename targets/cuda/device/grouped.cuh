// Convolutions whose channels see one input channel (depthwise), or few: on tensor cores they would multiply by zeros.
#pragma once
#include "image.cuh"
#include "numbers.cuh"

namespace qcompile {

struct Grouped {
  int images, channels;      // channels of y, a multiple of four
  int down, right;           // bytes of x from output row to row, and from column to column
  int filter_height, filter_width;
  int filter_down, filter_right;
  int64_t image_step;        // bytes from image to image of x
  int first;                 // to the first byte that the filter sees
  int inputs, outputs;       // channels of a group
  int last;                  // group
  Image y, residual;
  Margin margin;
  Requantize to;
};

// What four neighbouring channels are requantized with.
struct FourChannels {
  int bias[4];
  float m[4];

  __device__ __forceinline__ FourChannels(const int* all_bias, const float* all_m, int channel) {
#pragma unroll
    for (int i = 0; i < 4; i++) bias[i] = all_bias[channel + i], m[i] = all_m[channel + i];
  }
};

template <bool RESIDUAL>
__device__ __forceinline__ void store_four(
    const int (&sums)[4], const FourChannels& by, const int8_t* residual, int8_t* y, int n, int h, int w, int channel,
    const Grouped& c) {
  int value[4];
  uint32_t other = 0;
  if (RESIDUAL) other = *reinterpret_cast<const uint32_t*>(residual + c.residual.offset(n, h, w) + channel);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int sum = wrapping_add(sums[i], by.bias[i]);
    value[i] = RESIDUAL ? requantize(sum, by.m[i], byte_of(other, i), c.to) : requantize(sum, by.m[i], c.to);
  }
  *reinterpret_cast<uint32_t*>(y + c.y.offset(n, h, w) + channel) = pack4(value[0], value[1], value[2], value[3]);
}

// sums += the weights `tap` of four channels * those channels of pixels that lie STRIDE apart from `first` on.
template <int STRIDE, int PIXELS, int SEEN>
__device__ __forceinline__ void multiply_tap(int (&sums)[PIXELS][4], const uint32_t (&four)[SEEN], int first, uint4 tap) {
#pragma unroll
  for (int p = 0; p < PIXELS; p++) {
    uint32_t seen = four[p * STRIDE + first];
    sums[p][0] = dot4(seen, tap.x, sums[p][0]);
    sums[p][1] = dot4(seen, tap.y, sums[p][1]);
    sums[p][2] = dot4(seen, tap.z, sums[p][2]);
    sums[p][3] = dot4(seen, tap.w, sums[p][3]);
  }
}

// One input channel for each output channel. A thread computes four channels of PIXELS neighbouring pixels.
// weight: for every tap and channel a word with the weight in that byte of four that the channel has, else zeros: so a
// dot product picks its own byte of four channels.
// FILTER: its rows and columns, without dilation, at columns STRIDE apart: then what pixels share is loaded once. 0: any.
template <int PIXELS, int FILTER, int STRIDE, bool RESIDUAL>
__device__ __forceinline__ void depthwise(
    const int8_t* x, const int8_t* residual, const int8_t* weight, const int* bias, const float* m, int8_t* y,
    const Grouped& c) {
  constexpr int SEEN = FILTER ? (PIXELS - 1) * STRIDE + FILTER : PIXELS;  // columns that are loaded at once
  constexpr int ROWS_AT_ONCE = FILTER == 3 ? 3 : 1;                       // as registers last
  int words = c.channels / 4, across = (c.y.width + PIXELS - 1) / PIXELS;
  int64_t count = int64_t(c.images) * c.y.height * across * words;
  for (int64_t i = int64_t(block_x()) * threads() + thread(); i < count; i += int64_t(blocks_x()) * threads()) {
    int word = int(i % words);
    int64_t place = i / words;
    int w = int(place % across) * PIXELS, line = int(place / across), h = line % c.y.height, n = line / c.y.height;
    const int8_t* from = x + n * c.image_step + c.first + int64_t(h) * c.down + int64_t(w) * c.right + word * 4;
    const uint4* taps = reinterpret_cast<const uint4*>(weight) + word;
    int sums[PIXELS][4] = {};
    int step[SEEN];
    // Beyond the last pixel the first one is loaded again.
    int pixels = c.y.width - w < PIXELS ? c.y.width - w : PIXELS, seen = FILTER ? (pixels - 1) * STRIDE + FILTER : pixels;
#pragma unroll
    for (int j = 0; j < SEEN; j++) step[j] = (j < seen ? j : 0) * (FILTER ? c.filter_right : c.right);
    if constexpr (FILTER != 0) {
#pragma unroll ROWS_AT_ONCE
      for (int row = 0; row < FILTER; row++, from += c.filter_down) {
        uint32_t four[SEEN];
#pragma unroll
        for (int j = 0; j < SEEN; j++) four[j] = *reinterpret_cast<const uint32_t*>(from + step[j]);
#pragma unroll
        for (int column = 0; column < FILTER; column++, taps += words)
          multiply_tap<STRIDE>(sums, four, column, *taps);
      }
    } else {
      for (int row = 0; row < c.filter_height; row++)
        for (int column = 0; column < c.filter_width; column++, taps += words) {
          const int8_t* tap = from + int64_t(row) * c.filter_down + column * c.filter_right;
          uint32_t four[SEEN];
#pragma unroll
          for (int p = 0; p < PIXELS; p++) four[p] = *reinterpret_cast<const uint32_t*>(tap + step[p]);
          multiply_tap<1>(sums, four, 0, *taps);
        }
    }
    FourChannels by(bias, m, word * 4);
#pragma unroll
    for (int p = 0; p < PIXELS; p++)
      if (p < pixels) store_four<RESIDUAL>(sums[p], by, residual, y, n, h, w + p, word * 4, c);
  }
  c.margin.fill(y, c.y);
}

// Groups of any size. A thread computes four channels of a pixel, a product at a time.
// weight: (filter rows, columns, inputs of a group, channels of y).
template <bool RESIDUAL>
__device__ __forceinline__ void grouped(
    const int8_t* x, const int8_t* residual, const int8_t* weight, const int* bias, const float* m, int8_t* y,
    const Grouped& c) {
  int words = c.channels / 4;
  int64_t count = int64_t(c.images) * c.y.height * c.y.width * words;
  for (int64_t i = int64_t(block_x()) * threads() + thread(); i < count; i += int64_t(blocks_x()) * threads()) {
    int word = int(i % words);
    int64_t place = i / words;
    int w = int(place % c.y.width), line = int(place / c.y.width), h = line % c.y.height, n = line / c.y.height;
    const int8_t* from = x + n * c.image_step + c.first + int64_t(h) * c.down + int64_t(w) * c.right;
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(weight) + word;
    int sums[4] = {}, base[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      int group = (word * 4 + k) / c.outputs;
      base[k] = (group < c.last ? group : c.last) * c.inputs;
    }
    for (int row = 0; row < c.filter_height; row++)
      for (int column = 0; column < c.filter_width; column++) {
        const int8_t* tap = from + int64_t(row) * c.filter_down + column * c.filter_right;
        for (int input = 0; input < c.inputs; input++, weights += words) {
          uint32_t f = *weights;
#pragma unroll
          for (int k = 0; k < 4; k++) sums[k] += tap[base[k] + input] * byte_of(f, k);
        }
      }
    store_four<RESIDUAL>(sums, FourChannels(bias, m, word * 4), residual, y, n, h, w, word * 4, c);
  }
  c.margin.fill(y, c.y);
}

}  // namespace qcompile
