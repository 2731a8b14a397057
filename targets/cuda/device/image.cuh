// Where the pixels of an activation lie: images of rows of pixels, each with a margin (the halo) that holds zero points.
#pragma once
#include "instructions.cuh"

namespace qcompile {

struct Image {
  int height, width;                // without the margin
  int top, left;                    // of the margin
  int padded_height, padded_width;  // with it
  int pitch;                        // bytes of a pixel

  // The number of a pixel in memory.
  __device__ __forceinline__ int pixel(int n, int h, int w) const {
    return (n * padded_height + h + top) * padded_width + w + left;
  }
  // The same of the pixel that is number i without the margins.
  __device__ __forceinline__ int pixel(int i) const {
    if (padded_height == height && padded_width == width) return i;
    int line = i / width, n = line / height;
    return pixel(n, line - n * height, i - line * width);
  }
  __device__ __forceinline__ int64_t offset(int n, int h, int w) const { return int64_t(pixel(n, h, w)) * pitch; }
};

// What the margins of `images` images hold. Every thread of the launch writes its part.
struct Margin {
  int images;
  int value;

  __device__ void fill(int8_t* y, const Image& image) const {
    int sides = image.padded_width - image.width, above = image.top * image.padded_width;
    int each = image.padded_height * image.padded_width - image.height * image.width;
    if (each == 0) return;
    uint32_t word = uint32_t(value & 255) * 0x01010101u;
    int words = image.pitch / 4;
    int64_t count = int64_t(images) * each * words;
    int64_t block = (int64_t(block_z()) * blocks_y() + block_y()) * blocks_x() + block_x();
    int64_t step = int64_t(blocks_x()) * blocks_y() * blocks_z() * threads();
    for (int64_t i = block * threads() + thread(); i < count; i += step) {
      int part = int(i % words);
      int64_t place = i / words;
      int n = int(place / each), j = int(place % each), row, column;
      if (j < above) {
        row = j / image.padded_width, column = j % image.padded_width;
      } else if ((j -= above) < image.height * sides) {
        row = image.top + j / sides, column = j % sides;
        if (column >= image.left) column += image.width;
      } else {
        j -= image.height * sides;
        row = image.top + image.height + j / image.padded_width, column = j % image.padded_width;
      }
      int64_t pixel = (int64_t(n) * image.padded_height + row) * image.padded_width + column;
      reinterpret_cast<uint32_t*>(y + pixel * image.pitch)[part] = word;
    }
  }
};

// `use` of every word of four channels (a multiple of four) of every pixel of `images` images, a thread each.
template <class Use>
__device__ __forceinline__ void each_word(int images, int channels, const Image& y, Use&& use) {
  int words = channels / 4;
  int64_t count = int64_t(images) * y.height * y.width * words;
  for (int64_t i = int64_t(block_x()) * threads() + thread(); i < count; i += int64_t(blocks_x()) * threads()) {
    int word = int(i % words);
    int64_t place = i / words;
    int line = int(place / y.width);
    use(line / y.height, line % y.height, int(place % y.width), word);
  }
}

}  // namespace qcompile
