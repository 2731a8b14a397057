#include "device.h"

#include <dlfcn.h>
#include <elf.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

namespace qcompile::emulated {

const char* status_name(int status) {
  switch (status) {
    case success: return "CUDA_SUCCESS";
    case invalid_value: return "CUDA_ERROR_INVALID_VALUE";
    case out_of_memory: return "CUDA_ERROR_OUT_OF_MEMORY";
    case not_initialized: return "CUDA_ERROR_NOT_INITIALIZED";
    case no_device: return "CUDA_ERROR_NO_DEVICE";
    case invalid_device: return "CUDA_ERROR_INVALID_DEVICE";
    case invalid_image: return "CUDA_ERROR_INVALID_IMAGE";
    case invalid_handle: return "CUDA_ERROR_INVALID_HANDLE";
    case illegal_state: return "CUDA_ERROR_ILLEGAL_STATE";
    case not_found: return "CUDA_ERROR_NOT_FOUND";
    case not_ready: return "CUDA_ERROR_NOT_READY";
    case illegal_address: return "CUDA_ERROR_ILLEGAL_ADDRESS";
    case launch_failed: return "CUDA_ERROR_LAUNCH_FAILED";
    case not_supported: return "CUDA_ERROR_NOT_SUPPORTED";
    case capture_unsupported: return "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
    case capture_invalidated: return "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
    default: return "an error without a name";
  }
}

Device::Device() {
  const char* text = getenv("QCOMPILE_EMULATED_SM");
  capability = text != nullptr ? atoi(text) : 90;
}

Device& device() {
  static Device* the = new Device;  // never destroyed: others use it as the process ends
  return *the;
}

Status Device::fail(Status status, const std::string& text) {
  message = text;
  fprintf(stderr, "emulated GPU: %s\n", text.c_str());
  return status;
}

Status Device::drain() {
  for (Stream* stream : std::set<Stream*>(streams)) drain(stream);
  return failure;
}

Stream* Device::known(Stream* stream) {
  return stream == nullptr || reinterpret_cast<uintptr_t>(stream) <= 2 ? &null : stream;
}

Status Device::run(Stream* stream, const bool& done) {
  while (failure == success && !done && !stream->queue.empty()) {
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    failure = operation();
  }
  return failure;
}

Status Device::drain(Stream* stream) {
  stream = known(stream);
  if (failure != success || stream->queue.empty()) return failure;
  for (auto& item : memory) item.second->open(true);
  run(stream, false);
  for (auto& item : memory) {
    if (failure == success && !item.second->intact())
      failure = fail(illegal_address, "a write beyond " + std::to_string(item.second->size()) + " bytes of memory");
    item.second->open(false);
  }
  return failure;
}

Status Device::submit(Stream* stream, Operation operation) {
  stream = known(stream);
  if (failure != success) return failure;
  if (stream->capturing) {
    if (stream->invalidated) return capture_invalidated;
    stream->captured.push_back(std::move(operation));
    return success;
  }
  // The default stream waits for all others, hence for what is not being done.
  if (stream == &null && outside_capture() != success) return capture_unsupported;
  stream->queue.push_back(std::move(operation));
  return success;
}

Status Device::outside_capture() {
  if (capturing == nullptr) return failure;
  capturing->invalidated = true;
  return fail(capture_unsupported, "a call that is not allowed while a stream records a graph");
}

const Guarded* Device::find(const void* from, size_t bytes) const {
  auto after = memory.upper_bound(static_cast<const char*>(from));
  if (after == memory.begin()) return nullptr;
  const Guarded& at = *std::prev(after)->second;
  return at.holds(from, bytes) ? &at : nullptr;
}

// CUDA C++ Programming Guide, technical specifications per compute capability: the most that a block can have.
int Device::shared_per_block() const {
  switch (capability) {
    case 70: return 96 << 10;
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 90: case 100: case 103: return 227 << 10;
    default: return 99 << 10;
  }
}

// CUdevice_attribute of cuda.h.
Status Device::attribute(int number, int* value) const {
  switch (number) {
    case 1: case 2: case 3: *value = 1024; break;  // threads of a block, its x and y
    case 4: *value = 64; break;
    case 5: *value = INT_MAX; break;  // the grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = 48 << 10; break;  // shared memory without asking for more
    case 9: *value = 64 << 10; break;
    case 10: *value = 32; break;       // the warp
    case 12: case 82: *value = 1 << 16; break;  // registers
    case 13: *value = 1000000; break;
    case 16: *value = 4; break;   // multiprocessors
    case 38: *value = 4 << 20; break;  // second-level cache
    case 39: *value = 1024; break;
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 81: *value = shared_per_block() + (1 << 10); break;
    case 97: *value = shared_per_block(); break;
    default: return invalid_value;
  }
  return success;
}

Status Device::load(const void* image, Module** module) {
  if (Status status = outside_capture(); status != success) return status;
  const Elf64_Ehdr* header = static_cast<const Elf64_Ehdr*>(image);
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_machine != EM_X86_64)
    return fail(invalid_image, "the module is no library of emulated kernels");
  size_t bytes = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;  // which end a library of ld
  const char* folder = getenv("TMPDIR");
  std::string path = std::string(folder != nullptr ? folder : "/tmp") + "/qcompile-kernels-XXXXXX";
  int file = mkstemp(path.data());
  if (file < 0) return fail(invalid_image, "no temporary file " + path);
  bool written = write(file, image, bytes) == ssize_t(bytes);
  close(file);
  void* library = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path.c_str());
  if (library == nullptr) return fail(invalid_image, written ? dlerror() : "cannot write " + path);
  auto loaded = std::make_unique<Module>();
  loaded->library = library;
  loaded->launch = reinterpret_cast<decltype(loaded->launch)>(dlsym(library, "qcompile_launch"));
  if (loaded->launch == nullptr) return fail(invalid_image, "the module is no library of emulated kernels");
  *module = loaded.get();
  modules.push_back(std::move(loaded));
  return success;
}

Status Device::launch(Function* function, const int (&grid)[3], int threads, int shared, Stream* stream,
                      void** parameters) {
  std::vector<std::vector<char>> values;
  for (const int* size = function->sizes; *size != 0; size++) {
    const char* value = static_cast<const char*>(parameters[size - function->sizes]);
    values.emplace_back(value, value + *size);
  }
  if (capturing == stream && capturing != nullptr) counters["captured_launches"]++;
  int x = grid[0], y = grid[1], z = grid[2];
  return submit(stream, [=]() mutable {
    std::vector<void*> addresses;
    for (auto& value : values) {
      const char* pointer = nullptr;
      if (function->pointers[addresses.size()]) memcpy(&pointer, value.data(), sizeof pointer);
      if (pointer != nullptr && find(pointer, 0) == nullptr)
        return fail(illegal_address, function->name + ": parameter " + std::to_string(addresses.size()) +
                                         " does not point to memory of the device");
      addresses.push_back(value.data());
    }
    counters["launches"]++;
    const char* error = function->module->launch(function->entry, x, y, z, threads, shared, addresses.data());
    return error != nullptr ? fail(launch_failed, function->name + ": " + error) : success;
  });
}

Status Device::copy(void* to, const void* from, size_t bytes, int kind, Stream* stream) {
  if (bytes == 0) return failure;
  bool to_device = find(to, 0) != nullptr, from_device = find(from, 0) != nullptr;
  if (kind < 0 || kind > 4 || (kind != 4 && (to_device != (kind == 1 || kind == 3) || from_device != (kind >= 2))))
    return fail(invalid_value, "a copy whose ends lie elsewhere than its kind says");
  if ((to_device && find(to, bytes) == nullptr) || (from_device && find(from, bytes) == nullptr))
    return fail(invalid_value, "a copy of " + std::to_string(bytes) + " bytes goes beyond memory of the device");
  auto is_pinned = [&](const void* at) {
    auto after = pinned.upper_bound(static_cast<const char*>(at));
    return after != pinned.begin() && std::prev(after)->second->holds(at, bytes);
  };
  std::string name = std::string(from_device ? "device" : "host") + "_to_" + (to_device ? "device" : "host");
  bool records = capturing == stream && capturing != nullptr;
  std::vector<char> staged;  // as the driver does with memory of the host that may be swapped out
  if (!from_device && !is_pinned(from) && !records)
    staged.assign(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  Status status = submit(stream, [=, staged = std::move(staged)] {
    memmove(to, staged.empty() ? from : staged.data(), bytes);
    counters[name]++;
    return success;
  });
  return status == success && !to_device && !is_pinned(to) && !records ? drain(stream) : status;
}

}  // namespace qcompile::emulated
