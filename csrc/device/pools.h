// Events and pinned host memory, kept for reuse: to make them takes a driver's call, and to free the latter waits for
// the device.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device/runtime.h"

namespace torch_rpc_mpi {

// Of one device. Thread-safe: mutex_ guards free_.
class EventPool {
 public:
  EventPool(std::shared_ptr<const DeviceRuntime> runtime, c10::DeviceIndex device)
      : runtime_(std::move(runtime)),
        device_(device) {}
  ~EventPool();
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  void* get();
  void put(void* event) noexcept;
  const DeviceRuntime& runtime() const {
    return *runtime_;
  }
  c10::DeviceIndex device() const {
    return device_;
  }

 private:
  const std::shared_ptr<const DeviceRuntime> runtime_;
  const c10::DeviceIndex device_;
  std::mutex mutex_;
  std::vector<void*> free_;
};

// What lies in a stream before it has been done. Goes back to its pool, which it keeps alive.
class DeviceEvent {
 public:
  DeviceEvent() = default;
  explicit DeviceEvent(std::shared_ptr<EventPool> pool) : pool_(std::move(pool)), event_(pool_->get()) {}
  DeviceEvent(DeviceEvent&& other) noexcept
      : pool_(std::move(other.pool_)),
        event_(std::exchange(other.event_, nullptr)) {}
  DeviceEvent& operator=(DeviceEvent&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(event_, other.event_);
    return *this;
  }
  ~DeviceEvent() {
    if (event_ != nullptr) {
      pool_->put(event_);
    }
  }

  void record(void* stream) {
    pool_->runtime().record(event_, stream);
  }
  // The stream goes on behind what was recorded.
  void block(void* stream) const {
    pool_->runtime().waitFor(stream, event_);
  }
  bool complete() const {
    const OnDevice onDevice(pool_->runtime(), pool_->device()); // else it would make a context on another
    const RelaxedCapture relaxed(pool_->runtime());
    return pool_->runtime().complete(event_);
  }

 private:
  std::shared_ptr<EventPool> pool_;
  void* event_ = nullptr;
};

// Blocks of pinned memory, in sizes that are powers of two. Thread-safe: mutex_ guards the rest.
class PinnedPool {
 public:
  PinnedPool(std::shared_ptr<const DeviceRuntime> runtime, c10::DeviceIndex device)
      : runtime_(std::move(runtime)),
        device_(device) {}
  ~PinnedPool();
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  void* get(size_t bytes);
  void put(void* block, size_t bytes) noexcept;
  // Frees what lies unused. It may wait for the device.
  void trim();
  size_t bytes() const; // of all blocks

 private:
  static constexpr size_t kClasses = 48;
  static constexpr size_t kSmallest = 12; // a page
  static size_t classOf(size_t bytes);

  const std::shared_ptr<const DeviceRuntime> runtime_;
  const c10::DeviceIndex device_; // which has a context anyway
  mutable std::mutex mutex_;
  std::array<std::vector<void*>, kClasses> free_;
  size_t bytes_ = 0;
};

// Nothing of the device may be at it when it is destroyed.
class PinnedBlock {
 public:
  PinnedBlock() = default;
  PinnedBlock(std::shared_ptr<PinnedPool> pool, size_t bytes)
      : pool_(std::move(pool)),
        bytes_(bytes),
        data_(static_cast<char*>(pool_->get(bytes))) {}
  PinnedBlock(PinnedBlock&& other) noexcept
      : pool_(std::move(other.pool_)),
        bytes_(other.bytes_),
        data_(std::exchange(other.data_, nullptr)) {}
  PinnedBlock& operator=(PinnedBlock&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~PinnedBlock() {
    if (data_ != nullptr) {
      pool_->put(data_, bytes_);
    }
  }
  char* data() const {
    return data_;
  }

 private:
  std::shared_ptr<PinnedPool> pool_;
  size_t bytes_ = 0;
  char* data_ = nullptr;
};

} // namespace torch_rpc_mpi
