#include "peer/receive_pool.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

namespace torch_rpc_mpi {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallAlignment = 4096;

// An eighth of the memory for the processes of a host together.
size_t defaultCap(int processes) {
  const auto physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
  return std::min(physical / 8 / static_cast<size_t>(std::max(processes, 1)), size_t{4} << 30);
}

void* systemAllocate(size_t bytes) {
  void* block = std::aligned_alloc(bytes >= kHugePage ? kHugePage : kSmallAlignment, bytes);
  if (block == nullptr) {
    throw std::bad_alloc();
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

void ReceivePool::shareBetween(int processes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  cap_ = defaultCap(processes);
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
    throw std::bad_alloc();
  }
  const size_t size = classSize(bytes);
  {
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
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (cached_ + size <= cap_) {
      free_[size].push_back({block, Clock::now()});
      cached_ += size;
      return;
    }
  }
  std::free(block);
}

void ReceivePool::trim(Clock::time_point before) {
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
  }
  for (void* block : old) {
    std::free(block);
  }
}

size_t ReceivePool::cachedBytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cached_;
}

} // namespace torch_rpc_mpi
