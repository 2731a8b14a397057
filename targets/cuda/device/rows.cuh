// Linear layers of few rows: every weight is used but once or a few times, so that their way from memory is all that
// counts. A warp computes one output of all rows; its lanes share the sum.
#pragma once
#include "numbers.cuh"

namespace qcompile {

struct Rows {
  int rows, x_pitch, y_pitch, residual_pitch;
  int chunks;   // of 16 bytes of a row of x, and of weights
  int outputs;  // channels of y
  int weight_pitch;
  Requantize to;
};

// At most ROWS rows. weight: a row of weight_pitch bytes for each output.
template <int ROWS, bool RESIDUAL>
__device__ __forceinline__ void linear_rows(
    const int8_t* x, const int8_t* residual, const int8_t* weight, const int* bias, const float* m, int8_t* y,
    const Rows& c) {
  int lane = thread() % 32, output = block_x() * (threads() / 32) + thread() / 32;
  if (output >= c.outputs) return;
  const int8_t* weights = weight + int64_t(output) * c.weight_pitch;
  int sums[ROWS] = {};
  const int8_t* from[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; row++) from[row] = x + int64_t(row < c.rows ? row : 0) * c.x_pitch;
  // No branch on the row, which would keep loads from being in flight together.
#pragma unroll 4
  for (int chunk = lane; chunk < c.chunks; chunk += 32) {
    uint4 w = *reinterpret_cast<const uint4*>(weights + chunk * 16);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      uint4 v = *reinterpret_cast<const uint4*>(from[row] + chunk * 16);
      sums[row] = dot4(v.w, w.w, dot4(v.z, w.z, dot4(v.y, w.y, dot4(v.x, w.x, sums[row]))));
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    int sum = sums[row];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum = wrapping_add(sum, exchange(sum, mask));
    if (lane != 0 || row >= c.rows) continue;
    sum = wrapping_add(sum, bias[output]);
    int other = RESIDUAL ? residual[int64_t(row) * c.residual_pitch + output] : 0;
    y[int64_t(row) * c.y_pitch + output] =
        int8_t(RESIDUAL ? requantize(sum, m[output], other, c.to) : requantize(sum, m[output], c.to));
  }
}

}  // namespace qcompile
