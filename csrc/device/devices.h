// The accelerators that an agent uses.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include <c10/core/Allocator.h>

#include "base/clock.h"
#include "device/borrower.h"
#include "device/lender.h"
#include "device/pools.h"
#include "device/runtime.h"

namespace torch_rpc_mpi {

// Bytes of device tensors that were sent and received, by way.
struct DeviceCounters {
  std::atomic<uint64_t> sentPinned{0}, receivedPinned{0}; // through pinned memory and MPI
  std::atomic<uint64_t> sentIpc{0}, receivedIpc{0};       // through device memory that two processes share
  std::atomic<uint64_t> sentMpi{0}, receivedMpi{0};       // by MPI itself
};

// Does something when it is destroyed: held until some events are complete, it is done then.
class AtLast {
 public:
  explicit AtLast(std::function<void()> action) : action_(std::move(action)) {}
  ~AtLast() {
    action_();
  }
  AtLast(const AtLast&) = delete;
  AtLast& operator=(const AtLast&) = delete;

 private:
  const std::function<void()> action_;
};

// Thread-safe: mutex_ guards held_, of which holds_ is a hint; the counters are atomics; the rest is immutable, or
// guards itself. It lives as long as anything that refers to it, a message perhaps: hence shared.
class Devices {
 public:
  // All of the runtime's type, in the order of their indices.
  // chunk: bytes, of what MPI carries. mpiTakesMemory: it reads and writes the memory of these devices itself.
  Devices(
      std::shared_ptr<const DeviceRuntime> runtime,
      std::vector<c10::Device> devices,
      size_t chunk,
      bool mpiTakesMemory);

  const std::vector<c10::Device>& all() const {
    return devices_;
  }
  bool has(c10::Device device) const {
    return pools_.contains(device.index()) && device.type() == runtime_->type();
  }
  c10::DeviceType type() const {
    return runtime_->type();
  }
  const DeviceRuntime& runtime() const {
    return *runtime_;
  }

  size_t chunk() const {
    return chunk_;
  }

  bool mpiTakesMemory() const {
    return mpiTakesMemory_;
  }
  const char* wayOfMpi() const { // for people
    return mpiTakesMemory_ ? "mpi" : "pinned";
  }

  // Before anything is sent: lets neighbours read from device memory of this process, and this one from theirs. See
  // Lender.
  void share(const std::vector<DeviceName>& names, std::vector<bool> neighbours, size_t largest);
  Lender* lender() const { // null: does not share
    return lender_.get();
  }
  const std::shared_ptr<Borrower>& borrower() const {
    return borrower_;
  }

  // One for each device, which nobody else is given for a while.
  std::vector<c10::Stream> poolStreams() const;
  c10::Stream poolStream(c10::Device device) const;
  // Of this thread.
  c10::Stream currentStream(c10::Device device) const;
  // What is put into `later` from now on runs behind what lies in `earlier`.
  void order(const c10::Stream& earlier, const c10::Stream& later);

  DeviceEvent event(c10::Device device) const {
    return DeviceEvent(pools_.at(device.index()).events);
  }
  PinnedBlock pinned(c10::Device device, size_t bytes) const {
    return {pools_.at(device.index()).pinned, bytes};
  }
  // Memory for a tensor, to be used in `stream` first. Throws NoMemory.
  at::DataPtr allocate(const c10::Stream& stream, size_t bytes) const;
  // The memory is not reused before what lies in `stream` is done.
  void keepFor(const at::DataPtr& memory, const c10::Stream& stream) const;

  // Keeps an object until what an event was recorded behind has been done; then it is destroyed, by poll().
  void holdUntil(DeviceEvent event, std::shared_ptr<void> object);
  // Asks for some of the events; returns whether something is over.
  bool poll();
  bool holds() const {
    return holds_.load();
  }
  // At the end: nothing is held any more, and all memory is given back, whatever the devices still do. It waits for
  // them.
  void close();
  // Gives memory back that nothing has used since the time before. It may wait for the devices.
  void trim();
  bool keepsMemory() const; // that trim() would look at
  size_t pinnedBytes() const;

  DeviceCounters counters;
  std::atomic<size_t> chunksOut{0}, chunksIn{0}; // in pinned memory now

 private:
  void letGo();
  struct Pools {
    std::shared_ptr<EventPool> events;
    std::shared_ptr<PinnedPool> pinned;
  };
  struct Held {
    DeviceEvent event;
    std::shared_ptr<void> object;
  };

  const std::vector<c10::Device> devices_;
  const size_t chunk_;
  const bool mpiTakesMemory_;
  const std::shared_ptr<const DeviceRuntime> runtime_;
  std::map<c10::DeviceIndex, Pools> pools_;
  std::unique_ptr<Lender> lender_;
  std::shared_ptr<Borrower> borrower_;

  std::mutex mutex_;
  std::vector<Held> held_;
  size_t next_ = 0; // of held_, to be asked for
  Clock::time_point nextPoll_{};
  std::atomic<uint64_t> pinnedAtTrim_{0}; // bytes that had gone through pinned memory
  std::atomic<Clock::rep> lastTrim_{0};
  std::atomic<bool> holds_{false};
  std::atomic<bool> closed_{false};
};

} // namespace torch_rpc_mpi
