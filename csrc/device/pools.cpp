#include "device/pools.h"

#include <algorithm>
#include <bit>

#include "host/fork_guard.h"

namespace torch_rpc_mpi {

// A child made by fork() has no context: what it inherits of the runtime's it leaves alone.

EventPool::~EventPool() {
  if (inForkedChild()) {
    return;
  }
  try {
    const OnDevice onDevice(*runtime_, device_);
    for (void* event : free_) {
      runtime_->destroyEvent(event);
    }
  } catch (const std::exception&) { // the device is broken, or the process ends
  }
}

void* EventPool::get() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      void* const event = free_.back();
      free_.pop_back();
      return event;
    }
    free_.reserve(free_.capacity() + 1); // put() must not throw
  }
  const OnDevice onDevice(*runtime_, device_);
  return runtime_->createEvent();
}

void EventPool::put(void* event) noexcept {
  if (!inForkedChild()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(event);
  }
}

PinnedPool::~PinnedPool() {
  if (!inForkedChild()) {
    try {
      trim();
    } catch (const std::exception&) { // likewise
    }
  }
}

size_t PinnedPool::classOf(size_t bytes) {
  return std::max<size_t>(std::bit_width(std::max<size_t>(bytes, 1) - 1), kSmallest);
}

void* PinnedPool::get(size_t bytes) {
  const size_t number = classOf(bytes);
  const size_t size = size_t{1} << number;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& free = free_.at(number);
    if (!free.empty()) {
      void* const block = free.back();
      free.pop_back();
      return block;
    }
    free.reserve(free.capacity() + 1); // put() must not throw
    bytes_ += size;
  }
  try {
    const OnDevice onDevice(*runtime_, device_);
    const RelaxedCapture relaxed(*runtime_);
    return runtime_->allocatePinned(size);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ -= size;
    throw;
  }
}

void PinnedPool::put(void* block, size_t bytes) noexcept {
  if (!inForkedChild()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.at(classOf(bytes)).push_back(block);
  }
}

void PinnedPool::trim() {
  const OnDevice onDevice(*runtime_, device_);
  const RelaxedCapture relaxed(*runtime_);
  for (size_t number = kSmallest; number < kClasses; ++number) {
    std::vector<void*> unused;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      unused.assign(free_[number].begin(), free_[number].end());
      free_[number].clear(); // which keeps the room for put()
      bytes_ -= unused.size() << number;
    }
    for (void* block : unused) {
      runtime_->freePinned(block);
    }
  }
}

size_t PinnedPool::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

} // namespace torch_rpc_mpi
