// Convolutions and linear layers as a product of matrices whose left one is never written down: a row for each output
// pixel, with all that the filter sees of the image ("implicit GEMM").
//
// A row is read in segments: runs of bytes that lie side by side in memory. A segment is one tap's channels, or all taps
// of a filter's row where pixels have no other bytes between them. It is padded to whole chunks; the weights have zeros
// there and beyond the last segment.
#pragma once
#include "image.cuh"
#include "multiply.cuh"
#include "numbers.cuh"

namespace qcompile {

struct Convolution {
  int pixels;                           // rows of the product
  int out_height, out_width;
  int64_t image_step;                   // bytes from image to image of x,
  int first;                            // to what the filter sees first for the first output pixel,
  int down, right;                      // from output row to row and from column to column,
  int filter_down, filter_right;        // and between the rows, and the segments of a row, of the filter
  int segments, filter_rows;            // of a filter's row; rows of the filter
  int segment_bytes, segment_chunks;    // how long a segment is, and with padding
  int group_bytes;                      // of a pixel of x: from group to group
  int group_outputs;                    // channels of y, from group to group
  int depth_tiles;                      // of DEPTH bytes
  int shares;                           // blocks that share the depth of a tile
  Image y, residual;
  Margin margin;
  Requantize to;

  // Where the row of a pixel begins.
  __device__ __forceinline__ int64_t row_offset(int pixel) const {
    int line = pixel / out_width, image = line / out_height;
    return image * image_step + first + int64_t(line - image * out_height) * down + int64_t(pixel - line * out_width) * right;
  }
};

// TALL, WIDE: rows and columns of the tile of a block, which WARPS_DOWN x WARPS_RIGHT warps share. STAGES: tiles in flight.
// ACCESS: bytes that can be copied at once, as segments are aligned.
template <class Multiply_, int TALL_, int WIDE_, int WARPS_DOWN_, int WARPS_RIGHT_, int STAGES_, int ACCESS_>
struct Tile {
  using Multiply = Multiply_;
  static constexpr int TALL = TALL_, WIDE = WIDE_, WARPS_DOWN = WARPS_DOWN_, WARPS_RIGHT = WARPS_RIGHT_;
  static constexpr int STAGES = STAGES_, ACCESS = ACCESS_;
  static constexpr int THREADS = 32 * WARPS_DOWN * WARPS_RIGHT;
  static constexpr int ROWS = TALL / WARPS_DOWN / 16, COLUMNS = WIDE / WARPS_RIGHT / 8;  // of 16 x 8 sums, of a warp
  static constexpr int STAGE_BYTES = (TALL + WIDE) * DEPTH;
  static constexpr int LINES = THREADS / CHUNKS;                 // rows that the threads copy at once
  static constexpr int A = (TALL + LINES - 1) / LINES, B = (WIDE + LINES - 1) / LINES;
  static constexpr int RESULT_PITCH = WIDE + 16;                 // so that rows begin in different banks

  // Of the sums of the thread's warp.
  static __device__ __forceinline__ int first_row() { return thread() / 32 / WARPS_RIGHT * (16 * ROWS); }
  static __device__ __forceinline__ int first_column() { return thread() / 32 % WARPS_RIGHT * (8 * COLUMNS); }
};

// Which chunk of which segment a thread copies next, and how many bytes lie between the beginning of a row and it.
struct Walk {
  int chunk, offset, segment = 0, row = 0;

  __device__ __forceinline__ explicit Walk(int first, const Convolution& c) : chunk(first), offset(first * CHUNK) { wrap(c); }

  __device__ __forceinline__ void advance(const Convolution& c) {
    chunk += CHUNKS, offset += CHUNKS * CHUNK;
    wrap(c);
  }

  __device__ __forceinline__ void wrap(const Convolution& c) {
    while (chunk >= c.segment_chunks) {
      chunk -= c.segment_chunks, offset += c.filter_right - c.segment_chunks * CHUNK;
      if (++segment == c.segments) segment = 0, row++, offset += c.filter_down - c.segments * c.filter_right;
    }
  }
};

template <class T>
__device__ __forceinline__ void copy_chunk(char* to, const int8_t* from, int bytes) {
#pragma unroll
  for (int i = 0; i < CHUNK; i += T::ACCESS) copy_async<T::ACCESS>(to + i, from + i, i < bytes);
}

// The part of the product that this block computes.
struct Part {
  int first_pixel, first_output;  // of the tile; the latter within its group
  int group;
  int first_depth, end_depth;     // tiles

  __device__ __forceinline__ int first_channel(const Convolution& c) const { return group * c.group_outputs; }
};

// The sums of T's tile of x * weight over the depth of `part`; each warp has its rows and columns.
template <class T>
__device__ __forceinline__ void multiply_tiles(
    int (&sums)[T::ROWS][T::COLUMNS][4], const int8_t* x, const int8_t* weight, const Part& part, const Convolution& c) {
  char* shared = shared_memory();
  int line = thread() / CHUNKS, chunk = thread() % CHUNKS;
  int64_t weight_pitch = int64_t(c.depth_tiles) * DEPTH;

  const int8_t* rows[T::A];
#pragma unroll
  for (int i = 0; i < T::A; i++) {
    int pixel = part.first_pixel + line + i * T::LINES;
    // What is beyond the last pixel is multiplied, and not stored.
    rows[i] = x + part.group * c.group_bytes + c.row_offset(pixel < c.pixels ? pixel : 0);
  }
  const int8_t* weights =
      weight + (part.first_channel(c) + part.first_output + line) * weight_pitch + part.first_depth * DEPTH + chunk * CHUNK;

  Walk walk(part.first_depth * CHUNKS + chunk, c);
  int copy_place = chunk_at(line, chunk);  // and in the same chunk of every LINES-th row
  static_assert(T::LINES % 8 == 0, "eight rows begin in as many places");
  auto copy_tile = [&](int tile) {
    char *a = shared + tile % T::STAGES * T::STAGE_BYTES + copy_place, *b = a + T::TALL * DEPTH;
    int left = walk.row < c.filter_rows ? c.segment_bytes - walk.chunk * CHUNK : 0;
#pragma unroll
    for (int i = 0; i < T::A; i++) {
      if (T::TALL % T::LINES && line + i * T::LINES >= T::TALL) break;
      copy_chunk<T>(a + i * T::LINES * DEPTH, rows[i] + walk.offset, left);
    }
#pragma unroll
    for (int i = 0; i < T::B; i++) {
      if (T::WIDE % T::LINES && line + i * T::LINES >= T::WIDE) break;
      bool inside = part.first_output + line + i * T::LINES < c.group_outputs;
      copy_async<CHUNK>(b + i * T::LINES * DEPTH, weights + i * T::LINES * weight_pitch, inside);
    }
    weights += DEPTH;
    walk.advance(c);
  };

#pragma unroll
  for (int stage = 0; stage < T::STAGES - 1; stage++) {
    if (part.first_depth + stage < part.end_depth) copy_tile(part.first_depth + stage);
    commit_copies();
  }
  // As the results of an exchange they are kept; else the compiler would rather compute them anew for every tile.
  int place_a = exchange(T::Multiply::place_a(T::first_row()), 0);
  int place_b = exchange(T::Multiply::place_b(T::first_column()), 0);
  for (int tile = part.first_depth; tile < part.end_depth; tile++) {
    wait_for_copies<T::STAGES - 2>();
    barrier();  // all see this tile, and are done with the one that the next copy overwrites
    if (tile + T::STAGES - 1 < part.end_depth) copy_tile(tile + T::STAGES - 1);
    commit_copies();
    const char *a = shared + tile % T::STAGES * T::STAGE_BYTES, *b = a + T::TALL * DEPTH;
    T::Multiply::multiply(sums, a, place_a, b, place_b);
  }
  wait_for_copies<0>();
  barrier();
}

// y = requantize(sums + bias, m), perhaps plus a residual. The result goes through shared memory, so that whole chunks
// are stored; a residual comes the same way.
template <class T, bool RESIDUAL>
__device__ __forceinline__ void store_tile(
    const int (&sums)[T::ROWS][T::COLUMNS][4], const int8_t* residual, const int* bias, const float* m, int8_t* y,
    const Part& part, const Convolution& c) {
  constexpr int PARTS = T::WIDE / CHUNK;
  char* result = shared_memory();
  int first_channel = part.first_channel(c) + part.first_output;
  auto place = [&](const Image& image, int row, int chunk) {
    return int64_t(image.pixel(part.first_pixel + row)) * image.pitch + first_channel + chunk * CHUNK;
  };
  auto inside = [&](int row, int chunk) {
    return part.first_pixel + row < c.pixels && part.first_output + chunk * CHUNK < c.group_outputs;
  };
  if constexpr (RESIDUAL) {
    for (int i = thread(); i < T::TALL * PARTS; i += T::THREADS) {
      int row = i / PARTS, chunk = i % PARTS;
      bool allocated = first_channel + chunk * CHUNK < c.residual.pitch;
      if (inside(row, chunk) && allocated)
        *reinterpret_cast<uint4*>(result + row * T::RESULT_PITCH + chunk * CHUNK) =
            *reinterpret_cast<const uint4*>(residual + place(c.residual, row, chunk));
    }
    barrier();
  }
  int lane = thread() % 32, g = lane / 4, t = lane % 4, first_row = T::first_row() + g;
#pragma unroll
  for (int j = 0; j < T::COLUMNS; j++) {
    int column = T::first_column() + 8 * j + 2 * t;
    bool stored = part.first_output + column < c.group_outputs;
    int channel = stored ? first_channel + column : 0;
    int add[2] = {bias[channel], bias[channel + 1]};
    float factor[2] = {m[channel], m[channel + 1]};
#pragma unroll
    for (int i = 0; i < T::ROWS; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        char* at = result + (first_row + 16 * i + 8 * half) * T::RESULT_PITCH + column;
        int8_t* bytes = reinterpret_cast<int8_t*>(at);
        int value[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          int sum = wrapping_add(sums[i][j][2 * half + k], add[k]);
          value[k] = RESIDUAL ? requantize(sum, factor[k], bytes[k], c.to) : requantize(sum, factor[k], c.to);
        }
        *reinterpret_cast<uint16_t*>(at) = uint16_t((value[0] & 255) | (value[1] & 255) << 8);
      }
  }
  barrier();
  for (int i = thread(); i < T::TALL * PARTS; i += T::THREADS) {
    int row = i / PARTS, chunk = i % PARTS;
    if (inside(row, chunk))
      *reinterpret_cast<uint4*>(y + place(c.y, row, chunk)) =
          *reinterpret_cast<const uint4*>(result + row * T::RESULT_PITCH + chunk * CHUNK);
  }
}

// y = requantize(x * weight + bias, m), perhaps plus a residual. weight: a row of depth_tiles * DEPTH bytes for each
// channel of y.
template <class T, bool RESIDUAL>
__device__ __forceinline__ void convolution(
    const int8_t* x, const int8_t* residual, const int8_t* weight, const int* bias, const float* m, int8_t* y,
    const Convolution& c) {
  Part part{block_x() * T::TALL, block_y() * T::WIDE, block_z(), 0, c.depth_tiles};
  int sums[T::ROWS][T::COLUMNS][4] = {};
  multiply_tiles<T>(sums, x, weight, part, c);
  store_tile<T, RESIDUAL>(sums, residual, bias, m, y, part, c);
  c.margin.fill(y, c.y);
}

// The same for products of few pixels and great depth: several blocks share the depth of a tile ("split K"). Each writes
// its sums to `partial`; the one that is last, by the tickets of the tile, adds those of the others and goes on. The
// sums are integers: the order is no matter. `tickets`: a counter (int) for each tile, zero before
// and after.
template <class T, bool RESIDUAL>
__device__ __forceinline__ void split_convolution(
    const int8_t* x, const int8_t* residual, const int8_t* weight, const int* bias, const float* m, const uint8_t* tickets,
    int8_t* y, int* partial, const Convolution& c) {
  int share = block_z() % c.shares, each = (c.depth_tiles + c.shares - 1) / c.shares;
  int end = (share + 1) * each < c.depth_tiles ? (share + 1) * each : c.depth_tiles;
  Part part{block_x() * T::TALL, block_y() * T::WIDE, block_z() / c.shares, share * each, end};
  int sums[T::ROWS][T::COLUMNS][4] = {};
  multiply_tiles<T>(sums, x, weight, part, c);

  constexpr int SUMS = T::ROWS * T::COLUMNS * 4;  // of a thread
  int tile = (part.group * blocks_y() + block_y()) * blocks_x() + block_x();
  int* of_tile = partial + int64_t(tile) * c.shares * (SUMS * T::THREADS) + thread();
  auto each_sum = [&](int of, auto&& use) {
#pragma unroll
    for (int i = 0; i < T::ROWS; i++)
#pragma unroll
      for (int j = 0; j < T::COLUMNS; j++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          use(sums[i][j][k], of_tile + (of * SUMS + (i * T::COLUMNS + j) * 4 + k) * T::THREADS);
  };
  each_sum(share, [](int& sum, int* place) { *place = sum; });
  int* drawn = reinterpret_cast<int*>(shared_memory());
  publish();
  barrier();
  if (thread() == 0) *drawn = draw_ticket(const_cast<int*>(reinterpret_cast<const int*>(tickets)) + tile, c.shares);
  barrier();
  bool last = *drawn == c.shares - 1;
  barrier();  // what was drawn is where the result goes
  if (last) {
    for (int other = 0; other < c.shares; other++)
      if (other != share)
        each_sum(other, [](int& sum, int* place) { sum = wrapping_add(sum, load_published(place)); });
    store_tile<T, RESIDUAL>(sums, residual, bias, m, y, part, c);
  }
  c.margin.fill(y, c.y);
}

}  // namespace qcompile
