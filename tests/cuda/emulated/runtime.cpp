// The CUDA runtime's functions that TVM calls. https://docs.nvidia.com/cuda/cuda-runtime-api
#include <stdio.h>

#include <chrono>
#include <utility>

#include "device.h"

using namespace qcompile::emulated;

#define API extern "C" __attribute__((visibility("default"))) int
#define LOCK                                              \
  std::lock_guard<std::recursive_mutex> lock(device().mutex); \
  device().initialized = true

namespace {

using Clock = std::chrono::steady_clock;

struct Moment {
  Stream* stream;
  Clock::time_point time;
  bool done = false;
};

struct Event {
  std::shared_ptr<Moment> last;  // a stream may outlive the event
};

thread_local int last = success;

int noted(int status) {
  if (status != success) last = status;
  return status;
}

constexpr size_t total_memory = size_t(16) << 30;

int allocate(std::map<const char*, std::unique_ptr<Guarded>>& memory, void** result, size_t bytes) {
  Device& gpu = device();
  *result = nullptr;
  if (Status status = gpu.outside_capture(); status != success) return status;
  if (bytes == 0) return success;
  if (bytes > total_memory - gpu.used) return out_of_memory;
  auto block = std::make_unique<Guarded>(bytes, 256);
  if (block->data() == nullptr) return out_of_memory;
  poison(block->data(), bytes, gpu.random);
  *result = block->data();
  gpu.used += bytes;
  gpu.counters["allocations"]++;
  memory[block->data()] = std::move(block);
  return success;
}

int release(std::map<const char*, std::unique_ptr<Guarded>>& memory, void* at) {
  Device& gpu = device();
  if (at == nullptr) return success;
  if (gpu.capturing != nullptr) return gpu.outside_capture();
  auto found = memory.find(static_cast<const char*>(at));
  if (found == memory.end()) return gpu.fail(invalid_value, "free of what was not allocated");
  gpu.drain();
  gpu.used -= found->second->size();
  memory.erase(found);
  return success;  // also after a failure, unlike hardware: TVM frees in destructors, where an error ends the process
}

}  // namespace

API cudaGetDeviceCount(int* count) {
  LOCK;
  *count = 1;
  return success;
}

API cudaGetDevice(int* ordinal) {
  LOCK;
  *ordinal = 0;
  return success;
}

API cudaSetDevice(int ordinal) {
  LOCK;
  return noted(ordinal == 0 ? success : invalid_device);
}

API cudaDeviceGetAttribute(int* value, int attribute, int ordinal) {
  LOCK;
  return noted(ordinal == 0 ? device().attribute(attribute, value) : invalid_device);
}

API cudaGetDeviceProperties(char* properties, int ordinal) {  // cudaDeviceProp of CUDA 13, by its offsets
  LOCK;
  memset(properties, 0, 1008);
  snprintf(properties, 256, "emulated sm_%d", device().capability);
  auto set = [&](size_t offset, auto value) { memcpy(properties + offset, &value, sizeof value); };
  auto attribute = [&](int number) {
    int value = 0;
    device().attribute(number, &value);
    return value;
  };
  set(288, total_memory);
  set(296, size_t(attribute(8)));
  set(304, attribute(12));
  set(308, attribute(10));
  set(320, attribute(1));
  set(360, attribute(75));
  set(364, attribute(76));
  set(384, attribute(16));
  set(596, attribute(38));
  set(624, size_t(attribute(81)));
  set(672, size_t(attribute(97)));
  return noted(ordinal == 0 ? success : invalid_device);
}

API cudaMemGetInfo(size_t* available, size_t* total) {
  LOCK;
  *total = total_memory;
  *available = total_memory - device().used;
  return success;
}

API cudaMalloc(void** result, size_t bytes) {
  LOCK;
  int status = allocate(device().memory, result, bytes);
  if (*result != nullptr) device().memory[static_cast<char*>(*result)]->open(false);
  return noted(status);
}

API cudaFree(void* at) {
  LOCK;
  return noted(release(device().memory, at));
}

API cudaMallocHost(void** result, size_t bytes) {
  LOCK;
  return noted(allocate(device().pinned, result, bytes));
}

API cudaFreeHost(void* at) {
  LOCK;
  return noted(release(device().pinned, at));
}

API cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, Stream* stream) {
  LOCK;
  return noted(device().copy(to, from, bytes, kind, stream));
}

API cudaMemcpyPeerAsync(void* to, int to_ordinal, const void* from, int from_ordinal, size_t bytes, Stream* stream) {
  LOCK;
  return noted(to_ordinal == 0 && from_ordinal == 0 ? device().copy(to, from, bytes, 3, stream) : invalid_device);
}

// --- errors ----------------------------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) const char* cudaGetErrorName(int status) {
  return status_name(status);
}

extern "C" __attribute__((visibility("default"))) const char* cudaGetErrorString(int status) {
  return status != success && !device().message.empty() ? device().message.c_str() : status_name(status);
}

API cudaPeekAtLastError() { return device().failure != success ? device().failure : last; }

API cudaGetLastError() {
  int status = cudaPeekAtLastError();
  last = success;
  return status;
}

// --- streams and events ----------------------------------------------------------------------------------------------

API cudaStreamCreate(Stream** stream) {
  LOCK;
  device().streams.insert(*stream = new Stream);
  return noted(device().failure);
}

API cudaStreamCreateWithFlags(Stream** stream, unsigned) { return cudaStreamCreate(stream); }

API cudaStreamDestroy(Stream* stream) {
  LOCK;
  if (device().capturing == stream) device().capturing = nullptr;
  device().drain(stream);
  device().streams.erase(stream);
  delete stream;
  return success;
}

API cudaStreamSynchronize(Stream* stream) {
  LOCK;
  Status status = device().outside_capture();
  return noted(status == success ? device().drain(stream) : status);
}

API cudaStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  LOCK;
  if (event->last == nullptr) return success;  // nothing to wait for
  return noted(device().submit(stream, [last = event->last] { return device().run(last->stream, last->done); }));
}

API cudaEventCreate(Event** event) {
  *event = new Event;
  return success;
}

API cudaEventDestroy(Event* event) {
  LOCK;
  delete event;
  return success;
}

API cudaEventRecord(Event* event, Stream* stream) {
  LOCK;
  event->last = std::make_shared<Moment>();
  event->last->stream = device().known(stream);
  return noted(device().submit(stream, [last = event->last] {
    last->time = Clock::now();
    last->done = true;
    return success;
  }));
}

API cudaEventSynchronize(Event* event) {  // a stream that has done it may be gone
  return event->last && !event->last->done ? cudaStreamSynchronize(event->last->stream) : success;
}

API cudaEventElapsedTime(float* milliseconds, const Event* from, const Event* to) {
  *milliseconds = std::chrono::duration<float, std::milli>(to->last->time - from->last->time).count();
  return success;
}

// --- graphs ----------------------------------------------------------------------------------------------------------

API cudaStreamBeginCapture(Stream* stream, int) {
  LOCK;
  if (reinterpret_cast<uintptr_t>(stream) <= 2) return noted(capture_unsupported);  // the default ones cannot
  if (device().capturing != nullptr) return noted(illegal_state);
  device().capturing = stream;
  stream->capturing = true;
  return noted(device().failure);
}

API cudaStreamEndCapture(Stream* stream, Graph** graph) {
  LOCK;
  *graph = nullptr;
  if (device().capturing != stream) return noted(illegal_state);
  device().capturing = nullptr;
  stream->capturing = false;
  Graph recorded = std::exchange(stream->captured, {});
  if (std::exchange(stream->invalidated, false)) return noted(capture_invalidated);
  *graph = new Graph(std::move(recorded));
  return noted(device().failure);
}

API cudaGraphInstantiate(Graph** executable, const Graph* graph, unsigned long long) {
  *executable = new Graph(*graph);
  return success;
}

API cudaGraphLaunch(const Graph* executable, Stream* stream) {
  LOCK;
  device().counters["graph_launches"]++;
  for (const Operation& operation : *executable)
    if (Status status = device().submit(stream, operation); status != success) return noted(status);
  return success;
}

API cudaGraphDestroy(Graph* graph) {
  delete graph;
  return success;
}

API cudaGraphExecDestroy(Graph* executable) {
  delete executable;
  return success;
}
