// Kernels that test the emulator: instructions against their definitions, and mistakes that it has to find.
#include "instructions.cuh"

using namespace qcompile;

extern "C" __global__ void multiply_matrices(const uint4* a, const uint2* b, int4* c) {
  int lane = thread();
  uint32_t words[4] = {a[lane].x, a[lane].y, a[lane].z, a[lane].w};
  int sums[4] = {c[lane].x, c[lane].y, c[lane].z, c[lane].w};
  matrix_multiply_add(sums, words, b[lane].x, b[lane].y);
  c[lane] = make_int4(sums[0], sums[1], sums[2], sums[3]);
}

extern "C" __global__ void read_matrices(const char* bytes, const int* rows, uint4* words) {
  for (int i = thread(); i < 1024; i += threads()) shared_memory()[i] = bytes[i];
  barrier();
  uint32_t result[4];
  load_matrices(result, shared_memory() + rows[thread()]);
  words[thread()] = make_uint4(result[0], result[1], result[2], result[3]);
}

extern "C" __global__ void bytes(const uint32_t* a, const uint32_t* b, int* dots, uint32_t* larger, uint32_t* chosen) {
  int i = block_x() * threads() + thread();
  dots[i] = dot4(a[i], b[i], int(a[i]));
  larger[i] = larger4(a[i], b[i]);
  chosen[i] = permute(a[i], b[i], 0x7250);
}

extern "C" __global__ void numbers(const float* a, const float* b, float* product, float* sum, int* rounded,
                                   float* back) {
  int i = block_x() * threads() + thread();
  product[i] = multiply(a[i], b[i]);
  sum[i] = fused_multiply_add(a[i], b[i], b[i]);
  rounded[i] = round_half_even(a[i]);
  back[i] = to_float(rounded[i]);
}

extern "C" __global__ void exchange_all(int* values, const int* masks, int count) {
  for (int i = 0; i < count; i++) values[thread()] = exchange(values[thread()], masks[i]) + thread();
}

// The sum of as many numbers as there are threads; a power of two.
extern "C" __global__ void reduce(const int* values, int* sum, int careful) {
  int* partial = reinterpret_cast<int*>(shared_memory());
  partial[thread()] = values[block_x() * threads() + thread()];
  for (int half = threads() / 2; half > 0; half /= 2) {
    if (careful) barrier();
    if (thread() < half) partial[thread()] += partial[thread() + half];
  }
  if (thread() == 0) sum[block_x()] = partial[0];
}

// out[0], out[1]: what two groups of copies have brought after a wait for all but the last `left`; 2 is no wait.
extern "C" __global__ void copy_groups(const uint4* in, uint4* out, int left, int take) {
  uint4* shared = reinterpret_cast<uint4*>(shared_memory());
  copy_async<16>(&shared[thread()], &in[thread()], true);
  commit_copies();
  copy_async<8>(&shared[32 + thread()], &in[32 + thread()], take);
  copy_async<4>(&shared[32 + thread()].z, &in[32 + thread()].z, take);
  copy_async<4>(&shared[32 + thread()].w, &in[32 + thread()].w, take);
  commit_copies();
  if (left == 1) wait_for_copies<1>();
  if (left == 0) wait_for_copies<0>();
  out[thread()] = shared[thread()];
  out[32 + thread()] = shared[32 + thread()];
}

extern "C" __global__ void number_blocks(int* order, int* where) {
  int number = (block_z() * blocks_y() + block_y()) * blocks_x() + block_x();
  where[number * threads() + thread()] = number;
  if (thread() == 0) order[number] = order[blocks_x() * blocks_y() * blocks_z()]++;
}

extern "C" __global__ void add(const int* a, int* b, int64_t count, float more) {
  int64_t i = block_x() * threads() + thread();
  if (i < count) b[i] += a[i] + round_half_even(more);
}

// One mistake each.
extern "C" __global__ void mistake(int which, int* memory) {
  uint32_t words[4];
  int one = memory[0];  // 1, which the compiler does not know
  if (which == 0 && thread() == 40) return;
  if (which == 0) barrier();
  if (which == 1 && thread() != 3) exchange(0, 1);
  if (which == 2) {
    if (thread() < 32)
      barrier();
    else
      barrier();
  }
  if (which == 3) {
    if (thread() % 2 == 0)
      exchange(0, 1);
    else
      exchange(0, 1);
  }
  if (which == 4) load_matrices(words, shared_memory() + one * 8);
  if (which == 5) load_matrices(words, shared_memory() + one * 1024);
  if (which == 6) copy_async<8>(shared_memory(), memory + one, true);
  if (which == 7) memory[one * 4] = 0;
  if (which == 8) memory[one * -1] = 0;
  if (which == 9) shared_memory()[one * 1024] = 0;
  if (which == 10) *reinterpret_cast<int4*>(memory + one) = make_int4(0, 0, 0, 0);
  if (which == 11) words[one * 4] = 0, memory[1] = int(words[one * 4]);
  if (which == 12) permute(0, 0, uint32_t(one) * 8);
  if (which == 13) shared_memory()[one * 1000 + 1] = 0;
}
