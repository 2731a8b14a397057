// The GPU that the libraries here pretend to be: its memory, its modules, and what it has been told to do.
//
// What a stream is told is done when someone waits for it, as by a GPU that is slow: who forgets to wait gets old
// bytes. So is it with what the other streams were told, but for what this one was told to wait for; no stream waits for
// another by itself, as PyTorch's do not. Between, the memory of the device cannot be touched.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "guarded.h"

namespace qcompile::emulated {

// The numbers of cuda.h; the runtime has the same ones.
enum Status : int {
  success = 0,
  invalid_value = 1,
  out_of_memory = 2,
  not_initialized = 3,
  no_device = 100,
  invalid_device = 101,
  invalid_image = 200,
  invalid_handle = 400,
  not_found = 500,
  not_ready = 600,
  illegal_address = 700,
  launch_failed = 719,
  not_supported = 801,
  capture_unsupported = 900,
  capture_invalidated = 901,
  illegal_state = 401,
};
const char* status_name(int status);

using Operation = std::function<Status()>;
using Graph = std::vector<Operation>;

struct Stream {
  bool capturing = false, invalidated = false;
  Graph captured;
  std::deque<Operation> queue;
};

struct Module {
  void* library;
  const char* (*launch)(void (*)(void**), int, int, int, int, int, void**);
};

struct Function {
  std::string name;
  Module* module;
  void (*entry)(void**);
  const int* sizes;      // of the parameters, and 0
  const bool* pointers;  // which of them are pointers
  int shared_limit = 48 << 10;
};

struct Device {
  std::recursive_mutex mutex;
  int capability;  // 90 is sm_90
  bool initialized = false;
  Status failure = success;  // of a kernel: every later call reports it
  std::string message;       // of the failure
  std::map<std::string, int64_t> counters;
  std::map<const char*, std::unique_ptr<Guarded>> memory, pinned;
  size_t used = 0;
  std::vector<std::unique_ptr<Module>> modules;
  std::map<std::pair<Module*, std::string>, std::unique_ptr<Function>> functions;
  Stream null;
  Stream* capturing = nullptr;  // the one stream that records, if any
  std::set<Stream*> streams{&null};
  Random random;

  Device();
  Status fail(Status status, const std::string& text);
  // Do what all streams were told, or one of them.
  Status drain();
  Status drain(Stream* stream);
  // The same in the middle of it, till `done`.
  Status run(Stream* stream, const bool& done);
  // What the caller has of it: null, 1 and 2 are the default ones.
  Stream* known(Stream* stream);
  // Run, later or as a part of a graph.
  Status submit(Stream* stream, Operation operation);
  // For calls that the device cannot do while a stream records: they spoil the recording.
  Status outside_capture();
  // The memory of the device that holds these bytes, or nullptr.
  const Guarded* find(const void* from, size_t bytes) const;
  int shared_per_block() const;
  Status attribute(int number, int* value) const;
  Status load(const void* image, Module** module);
  Status launch(Function* function, const int (&grid)[3], int threads, int shared, Stream* stream, void** parameters);
  Status copy(void* to, const void* from, size_t bytes, int kind, Stream* stream);
};
Device& device();

}  // namespace qcompile::emulated
