// The last events of this process's calls, for the question what happened before something went wrong.
//
// Note [Flight recorder]
// ~~~~~~~~~~~~~~~~~~~~~~
// It always records, since nobody knows beforehand when it is needed: some twenty instructions an event, eight events a
// call on both sides together, no lock and no memory. The oldest events are overwritten. What is written where is in
// agent/flight_log.h.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "base/ticks.h"

namespace torch_rpc_mpi {

enum class CallEvent : uint8_t {
  kMade = 1,      // here
  kSent = 2,      // a request or a response was given to MPI
  kArrived = 3,   // a request, whole
  kStarted = 4,   // it runs
  kFinished = 5,  // its response is there
  kAnswered = 6,  // a response, whole
  kCompleted = 7, // the future is
  kFailed = 8,
  kTimedOut = 9,
  kPeerLost = 10
};

// Thread-safe, without a lock: each slot has a stamp, which is 0 while it is written.
class FlightRecorder {
 public:
  static constexpr size_t kSlots = 4096;

  struct Event {
    std::chrono::system_clock::time_point when;
    CallEvent kind = CallEvent::kMade;
    int peer = 0;
    uint32_t messageType = 0; // torch's
    uint64_t callId = 0;
    uint64_t bytes = 0;
  };

  FlightRecorder() : ticksAtStart_(ticks()), start_(std::chrono::system_clock::now()) {}
  static FlightRecorder& instance();

  void record(CallEvent kind, int peer, uint64_t callId, uint32_t messageType = 0, uint64_t bytes = 0) noexcept {
    const uint64_t number = next_.fetch_add(1, std::memory_order_relaxed);
    Slot& slot = slots_[number % kSlots];
    slot.stamp.store(0, std::memory_order_relaxed);
    // Whoever sees one of these sees the stamp of 0, or a later one, after it.
    slot.ticks.store(ticks(), std::memory_order_release);
    slot.callId.store(callId, std::memory_order_release);
    slot.bytes.store(bytes, std::memory_order_release);
    slot.what.store(
        static_cast<uint64_t>(kind) << 56 | (uint64_t{messageType} & 0xffffff) << 32 | static_cast<uint32_t>(peer),
        std::memory_order_release);
    slot.stamp.store(number + 1, std::memory_order_release);
  }

  // The oldest first, without those that are being written.
  std::vector<Event> events() const;

 private:
  struct Slot {
    std::atomic<uint64_t> stamp{0}, ticks{0}, callId{0}, bytes{0}, what{0};
  };
  const uint64_t ticksAtStart_;
  const std::chrono::system_clock::time_point start_;
  std::atomic<uint64_t> next_{0};
  std::array<Slot, kSlots> slots_;
};

} // namespace torch_rpc_mpi
