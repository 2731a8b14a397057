// Memory whose end is watched: what comes after it cannot be touched, and what it holds at first is random.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

namespace qcompile::emulated {

// Random numbers from a seed (Marsaglia, Xorshift RNGs, 2003): a run is the same each time.
struct Random {
  uint64_t state = 0x9E3779B97F4A7C15u;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  size_t below(size_t count) { return (next() >> 16) % count; }
};

// Bytes that no kernel counts on, many at once: a piece of a long random one, from another place each time.
inline void poison(void* memory, size_t bytes, Random& random) {
  static const std::vector<char> noise = [] {
    std::vector<char> bytes(1 << 18);
    Random random;
    for (size_t i = 0; i < bytes.size(); i += 8) *reinterpret_cast<uint64_t*>(&bytes[i]) = random.next();
    return bytes;
  }();
  for (char* at = static_cast<char*>(memory); bytes > 0;) {
    size_t piece = bytes < noise.size() / 2 ? bytes : noise.size() / 2;
    memcpy(at, &noise[random.below(noise.size() - piece)], piece);
    at += piece;
    bytes -= piece;
  }
}

// `bytes` from an address at `alignment`, the inaccessible page as soon after them as that allows. The bytes between,
// and those before, hold a pattern that `intact` looks for: a write to them is found late, a read not at all.
class Guarded {
 public:
  Guarded(size_t bytes, size_t alignment) : bytes_(bytes) {
    size_t room = (bytes + alignment - 1) / alignment * alignment;
    mapped_ = (room + page - 1) / page * page + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) {
      base_ = nullptr;
      return;
    }
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    data_ = base_ + mapped_ - page - room;
    memset(base_ + page, pattern, data_ - base_ - page);
    memset(data_ + bytes, pattern, room - bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }

  char* data() const { return data_; }  // nullptr where there is no memory left
  size_t size() const { return bytes_; }
  bool holds(const void* from, size_t bytes) const {
    const char* at = static_cast<const char*>(from);
    return at >= data_ && bytes <= bytes_ && at - data_ <= ptrdiff_t(bytes_ - bytes);
  }
  bool intact() const {
    char wrong = 0;
    for (const char* at = base_ + page; at < data_; at++) wrong |= *at ^ pattern;
    for (const char* at = data_ + bytes_; at < base_ + mapped_ - page; at++) wrong |= *at ^ pattern;
    return wrong == 0;
  }
  // Whether it can be touched at all; at first it can.
  void open(bool whether) const {
    mprotect(base_ + page, mapped_ - 2 * page, whether ? PROT_READ | PROT_WRITE : PROT_NONE);
  }

 private:
  static constexpr size_t page = 4096;
  static constexpr char pattern = 0x5b;
  size_t bytes_, mapped_;
  char *base_, *data_ = nullptr;
};

}  // namespace qcompile::emulated
