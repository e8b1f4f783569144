#include "peer/receive_pool.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include <sys/mman.h>

#include "host/fork_guard.h"
#include "host/no_memory.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallAlignment = 4096;

// An eighth of the memory for the processes of a host together.
size_t defaultCap(int processes) {
  return std::min(usableMemory() / 8 / static_cast<size_t>(std::max(processes, 1)), size_t{4} << 30);
}

// Not of the heap, where the advice would stay with the addresses: whatever lay there later would lie on huge pages,
// and the kernel would fill up those of which the heap has given back a part. Null if there is no memory.
void* mapHugePages(size_t bytes) {
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return nullptr;
  }
  const auto address = reinterpret_cast<uintptr_t>(mapped);
  const size_t before = (kHugePage - address % kHugePage) % kHugePage;
  char* block = static_cast<char*>(mapped) + before;
  if (before > 0) {
    (void)munmap(mapped, before);
  }
  (void)munmap(block + bytes, kHugePage - before);
  (void)madvise(block, bytes, MADV_HUGEPAGE); // advice: without it everything still works
  return block;
}

void* systemAllocate(size_t bytes) {
  void* block = bytes >= kHugePage ? mapHugePages(bytes) : std::aligned_alloc(kSmallAlignment, bytes);
  if (block == nullptr) {
    throw NoMemory("a tensor that is received", bytes);
  }
  return block;
}

void systemFree(void* block, size_t bytes) {
  if (bytes >= kHugePage) {
    (void)munmap(block, bytes);
  } else {
    std::free(block);
  }
}

} // namespace

ReceivePool& ReceivePool::instance() {
  static auto* pool = new ReceivePool(defaultCap(1));
  return *pool;
}

ReceivePool::ReceivePool(size_t cap) : cap_(cap) {
  watchForks();
}

void ReceivePool::shareBetween(int processes) {
  const size_t cap = defaultCap(processes);
  const std::lock_guard<std::mutex> lock(mutex_);
  cap_ = cap;
}

ReceivePool::~ReceivePool() {
  trim(Clock::time_point::max());
}

size_t ReceivePool::classSize(size_t bytes) {
  if (bytes <= kSmallAlignment) {
    return kSmallAlignment;
  }
  // Four classes to a power of two; whole huge pages from there on.
  const size_t step = std::max(std::bit_floor(bytes - 1) / 4, kSmallAlignment);
  const size_t size = (bytes + step - 1) / step * step;
  return size < kHugePage ? size : (size + kHugePage - 1) / kHugePage * kHugePage;
}

void* ReceivePool::allocate(size_t bytes) {
  if (bytes > (size_t{1} << 62)) {
    throw NoMemory("a tensor that is received", bytes);
  }
  const size_t size = classSize(bytes);
  if (!inForkedChild()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = free_.find(size);
    if (found != free_.end() && !found->second.empty()) {
      void* block = found->second.back().block; // the warmest
      found->second.pop_back();
      cached_ -= size;
      return block;
    }
  }
  return systemAllocate(size);
}

void ReceivePool::release(void* block, size_t bytes) {
  const size_t size = classSize(bytes);
  if (!inForkedChild()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (cached_ + size <= cap_) {
      try {
        free_[size].push_back({block, Clock::now()});
        cached_ += size;
        return;
      } catch (const std::bad_alloc&) { // called by destructors of tensors, which must not throw
      }
    }
  }
  systemFree(block, size);
}

void ReceivePool::trim(Clock::time_point before) {
  if (inForkedChild()) {
    return;
  }
  std::vector<std::pair<void*, size_t>> old;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : free_) {
      const auto end =
          std::find_if(blocks.begin(), blocks.end(), [&](const FreeBlock& b) { return b.since >= before; });
      for (auto block = blocks.begin(); block != end; ++block) {
        old.emplace_back(block->block, size);
        cached_ -= size;
      }
      blocks.erase(blocks.begin(), end);
    }
    std::erase_if(free_, [](const auto& entry) { return entry.second.empty(); });
  }
  for (const auto& [block, size] : old) {
    systemFree(block, size);
  }
}

size_t ReceivePool::cachedBytes() const {
  if (inForkedChild()) {
    return 0;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  return cached_;
}

} // namespace torch_rpc_mpi
