// The CUDA driver's functions that TVM and the project call. https://docs.nvidia.com/cuda/cuda-driver-api
#include <dlfcn.h>
#include <stdio.h>

#include "device.h"

using namespace qcompile::emulated;

#define API extern "C" __attribute__((visibility("default"))) int
#define LOCK std::lock_guard<std::recursive_mutex> lock(device().mutex)

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char padding[4], value[64];
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  Stream* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);

constexpr int programmatic_stream_serialization = 6, max_dynamic_shared_bytes = 8;

API cuInit(unsigned flags) {
  device().initialized = true;
  return flags == 0 ? success : invalid_value;
}

API cuDriverGetVersion(int* version) {
  *version = 13000;
  return success;
}

API cuDeviceGetCount(int* count) {
  *count = 1;
  return device().initialized ? success : not_initialized;
}

API cuDeviceGet(int* handle, int ordinal) {
  *handle = 0;
  return !device().initialized ? not_initialized : ordinal == 0 ? success : invalid_device;
}

API cuDeviceGetAttribute(int* value, int attribute, int ordinal) {
  if (!device().initialized) return not_initialized;
  return ordinal == 0 ? device().attribute(attribute, value) : invalid_device;
}

API cuDeviceGetName(char* name, int bytes, int ordinal) {
  snprintf(name, bytes, "emulated sm_%d", device().capability);
  return ordinal == 0 ? success : invalid_device;
}

API cuGetErrorName(int status, const char** name) {
  *name = status_name(status);
  return success;
}

API cuGetErrorString(int status, const char** text) {
  bool said = !device().message.empty() && status != success;
  *text = said ? device().message.c_str() : status_name(status);
  return success;
}

API cuModuleLoadData(Module** module, const void* image) {
  LOCK;
  return device().load(image, module);
}

API cuModuleUnload(Module* module) {
  LOCK;
  Device& gpu = device();
  gpu.drain();
  for (auto at = gpu.functions.begin(); at != gpu.functions.end();)
    at = at->first.first == module ? gpu.functions.erase(at) : std::next(at);
  for (auto at = gpu.modules.begin(); at != gpu.modules.end(); at++)
    if (at->get() == module) {
      dlclose(module->library);
      gpu.modules.erase(at);
      return success;
    }
  return invalid_handle;
}

API cuModuleGetFunction(Function** function, Module* module, const char* name) {
  LOCK;
  auto& found = device().functions[{module, name}];
  if (found == nullptr) {
    auto symbol = [&](const char* suffix) { return dlsym(module->library, (name + std::string(suffix)).c_str()); };
    void *entry = symbol("_launch"), *sizes = symbol("_parameter_sizes"), *pointers = symbol("_parameter_pointers");
    if (entry == nullptr || sizes == nullptr || pointers == nullptr) return not_found;
    found = std::make_unique<Function>();
    found->name = name;
    found->module = module;
    found->entry = reinterpret_cast<void (*)(void**)>(entry);
    found->sizes = static_cast<const int*>(sizes);
    found->pointers = static_cast<const bool*>(pointers);
  }
  *function = found.get();
  return success;
}

API cuFuncSetAttribute(Function* function, int attribute, int value) {
  LOCK;
  if (attribute != max_dynamic_shared_bytes) return not_supported;
  if (value < 0 || value > device().shared_per_block())
    return device().fail(invalid_value, function->name + ": " + std::to_string(value) + " bytes of shared memory");
  function->shared_limit = value;
  return success;
}

API cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** parameters, void** extra) {
  LOCK;
  const unsigned(&grid)[3] = config->grid, (&block)[3] = config->block;
  for (unsigned i = 0; i < config->attribute_count; i++)
    if (config->attributes[i].id != programmatic_stream_serialization)
      return device().fail(not_supported, function->name + ": a launch attribute");
  if (extra != nullptr || block[1] != 1 || block[2] != 1)
    return device().fail(not_supported, function->name + ": a block of more than one dimension");
  if (block[0] < 1 || block[0] > 1024 || grid[0] < 1 || grid[0] > 0x7fffffff || grid[1] < 1 || grid[1] > 65535 ||
      grid[2] < 1 || grid[2] > 65535)
    return device().fail(invalid_value, function->name + ": a grid or block of this size");
  if (config->shared > unsigned(function->shared_limit))
    return device().fail(invalid_value, function->name + ": " + std::to_string(config->shared) +
                                            " bytes of shared memory, of " + std::to_string(function->shared_limit));
  return device().launch(function, {int(grid[0]), int(grid[1]), int(grid[2])}, int(block[0]), int(config->shared),
                         config->stream, parameters);
}

API cuTensorMapEncodeTiled() { return not_supported; }

// How often something was done since the process began: "launches" and "graph_launches"; "captured_launches", which
// were recorded; "host_to_device" and the other copies; "allocations" of memory.
extern "C" __attribute__((visibility("default"))) int64_t qcompile_emulated_counter(const char* name) {
  LOCK;
  return device().counters[name];
}

// What the last call that failed said.
extern "C" __attribute__((visibility("default"))) const char* qcompile_emulated_message() {
  return device().message.c_str();
}

// Forget a failure, which otherwise every later call reports: a test that provoked one leaves none behind.
extern "C" __attribute__((visibility("default"))) void qcompile_emulated_reset() {
  LOCK;
  for (Stream* stream : device().streams) stream->queue.clear();
  device().failure = success;
}
