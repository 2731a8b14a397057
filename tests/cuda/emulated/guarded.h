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

// `bytes` from an address at `alignment`, between stretches that cannot be touched: of addresses only, they take no
// memory. The second begins as soon as pages and the alignment allow. Bytes of the pages beside hold a pattern that
// `intact` looks for: a write to them is found late, a read not at all.
class Guarded {
 public:
  Guarded(size_t bytes, size_t alignment) : bytes_(bytes) {
    size_t room = (bytes + alignment - 1) / alignment * alignment;
    pages_ = (room + page - 1) / page * page;
    void* mapped = mmap(nullptr, pages_ + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return;
    base_ = static_cast<char*>(mapped) + guard;
    if (pages_ != 0 && mprotect(base_, pages_, PROT_READ | PROT_WRITE) != 0) return;
    data_ = base_ + pages_ - room;
    memset(base_, pattern, data_ - base_);
    memset(data_ + bytes, pattern, room - bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    if (base_ != nullptr) munmap(base_ - guard, pages_ + 2 * guard);
  }

  char* data() const { return data_; }  // nullptr where there is no memory left
  size_t size() const { return bytes_; }
  bool holds(const void* from, size_t bytes) const {
    const char* at = static_cast<const char*>(from);
    return at >= data_ && bytes <= bytes_ && at - data_ <= ptrdiff_t(bytes_ - bytes);
  }
  bool intact() const {
    char wrong = 0;
    for (const char* at = base_; at < data_; at++) wrong |= *at ^ pattern;
    for (const char* at = data_ + bytes_; at < base_ + pages_; at++) wrong |= *at ^ pattern;
    return wrong == 0;
  }
  // Whether it can be touched at all; at first it can.
  void open(bool whether) const {
    mprotect(base_, pages_, whether ? PROT_READ | PROT_WRITE : PROT_NONE);
  }

 private:
  static constexpr size_t page = 4096, guard = 64 << 20;
  static constexpr char pattern = 0x5b;
  size_t bytes_, pages_;
  char *base_ = nullptr, *data_ = nullptr;
};

}  // namespace qcompile::emulated
