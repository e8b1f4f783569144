#include "memory.h"

#include <map>
#include <mutex>
#include <utility>

#include <sys/mman.h>

#include "devices.h"
#include "errors.h"

namespace rpctest {

namespace {

// Never destroyed: memory may be freed when the process ends.
struct Registry {
  std::mutex mutex;
  std::map<const char*, Range> ranges; // by their ends
};

Registry& registry() {
  static auto* ranges = new Registry;
  return *ranges;
}

// Under the registry's lock, as are the next two.
Range* find(const void* pointer) {
  const auto at = registry().ranges.upper_bound(static_cast<const char*>(pointer));
  return at == registry().ranges.end() || at->second.begin > pointer ? nullptr : &at->second;
}

void add(const Range& range) {
  registry().ranges[range.begin + range.size] = range;
}

// The range that begins there, which is then no longer known.
std::optional<Range> take(const void* pointer, Range::Kind kind) {
  const Range* range = find(pointer);
  if (range == nullptr || range->begin != pointer || range->kind != kind) {
    return std::nullopt;
  }
  const Range taken = *range;
  registry().ranges.erase(taken.begin + taken.size);
  return taken;
}

} // namespace

std::optional<Range> rangeOf(const void* pointer) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const Range* range = find(pointer);
  return range == nullptr ? std::nullopt : std::optional<Range>(*range);
}

bool onDevice(const void* pointer) {
  const auto range = rangeOf(pointer);
  return range && (range->kind == Range::Kind::kDevice || range->kind == Range::Kind::kOpened);
}

bool onPinnedHost(const void* pointer) {
  const auto range = rangeOf(pointer);
  return range && (range->kind == Range::Kind::kPinned || range->kind == Range::Kind::kRegistered);
}

int allocateDevice(void** pointer, size_t size, int device) {
  Handle handle{};
  handle.kind = Handle::Kind::kMemory;
  handle.device = physicalDevice(device);
  void* memory = mapShared(size, &handle);
  if (memory == nullptr) {
    return kMemoryAllocation;
  }
  const std::lock_guard<std::mutex> lock(registry().mutex);
  add({Range::Kind::kDevice, static_cast<char*>(memory), size, device, handle, 1});
  *pointer = memory;
  return kSuccess;
}

int freeDevice(void* pointer) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto range = take(pointer, Range::Kind::kDevice);
  if (!range) {
    return kInvalidValue;
  }
  unmapShared(range->begin, range->handle);
  return kSuccess;
}

int allocatePinned(void** pointer, size_t size) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return kMemoryAllocation;
  }
  const std::lock_guard<std::mutex> lock(registry().mutex);
  add({Range::Kind::kPinned, static_cast<char*>(memory), size, -1, {}, 1});
  *pointer = memory;
  return kSuccess;
}

int freePinned(void* pointer) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto range = take(pointer, Range::Kind::kPinned);
  if (!range) {
    return kInvalidValue;
  }
  munmap(range->begin, range->size);
  return kSuccess;
}

int registerHost(void* pointer, size_t size) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  auto* begin = static_cast<char*>(pointer);
  const auto next = registry().ranges.upper_bound(begin);
  if (next != registry().ranges.end() && next->second.begin < begin + size) {
    return kHostMemoryAlreadyRegistered;
  }
  add({Range::Kind::kRegistered, begin, size, -1, {}, 1});
  return kSuccess;
}

int unregisterHost(void* pointer) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  return take(pointer, Range::Kind::kRegistered) ? kSuccess : kHostMemoryNotRegistered;
}

int openMemory(void** pointer, const Handle& handle, int device) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  for (auto& [end, range] : registry().ranges) {
    if (range.kind == Range::Kind::kOpened && range.handle.process == handle.process &&
        range.handle.offset == handle.offset) {
      ++range.uses;
      *pointer = range.begin;
      return kSuccess;
    }
  }
  void* memory = mapShared(handle);
  if (memory == nullptr) {
    return kMapBufferFailed;
  }
  add({Range::Kind::kOpened, static_cast<char*>(memory), handle.size, device, handle, 1});
  *pointer = memory;
  return kSuccess;
}

int closeMemory(void* pointer) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  auto range = take(pointer, Range::Kind::kOpened);
  if (!range) {
    return kInvalidValue;
  }
  if (--range->uses > 0) {
    add(*range);
  } else {
    unmapShared(range->begin, range->handle);
  }
  return kSuccess;
}

} // namespace rpctest
