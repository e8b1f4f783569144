#include "peer/receive_pool.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>

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

void* systemAllocate(size_t bytes) {
  void* block = std::aligned_alloc(bytes >= kHugePage ? kHugePage : kSmallAlignment, bytes);
  if (block == nullptr) {
    throw NoMemory("a tensor that is received", bytes);
  }
  if (bytes >= kHugePage) {
    (void)madvise(block, bytes, MADV_HUGEPAGE); // advice: without it everything still works
  }
  return block;
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
      } catch (const std::bad_alloc&) { throw; // called by destructors of tensors, which must not throw
      }
    }
  }
  std::free(block);
}

void ReceivePool::trim(Clock::time_point before) {
  if (inForkedChild()) {
    return;
  }
  std::vector<void*> old;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : free_) {
      const auto end =
          std::find_if(blocks.begin(), blocks.end(), [&](const FreeBlock& b) { return b.since >= before; });
      for (auto block = blocks.begin(); block != end; ++block) {
        old.push_back(block->block);
        cached_ -= size;
      }
      blocks.erase(blocks.begin(), end);
    }
    std::erase_if(free_, [](const auto& entry) { return entry.second.empty(); });
  }
  for (void* block : old) {
    std::free(block);
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
