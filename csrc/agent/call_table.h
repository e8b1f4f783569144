// Calls that wait for their response: id to future and deadline.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/rpc/message.h>

#include "base/clock.h"

namespace torch_rpc_mpi {

using JitFuturePtr = c10::intrusive_ptr<c10::ivalue::Future>;

struct PendingCall {
  JitFuturePtr future;
  int peer = 0;
  torch::distributed::rpc::MessageType type = torch::distributed::rpc::MessageType::UNKNOWN;
  std::chrono::milliseconds timeout{0}; // 0: none
  Clock::time_point made;
  std::string failure = {}; // with which it ends when its time is over, instead of "timed out"
};

// Thread-safe: mutex_ guards all but nextDeadline_ and size_, which are hints for others. Every call is taken exactly
// once, by whoever completes it; futures are never completed in here.
//
// An id names a slot and how often the slot was used, so that a late response cannot complete another call; no id is 0,
// however often. Calls with
// the same timeout expire in the order in which they were made: one list for each distinct timeout keeps adding,
// taking and expiring O(1) and leaves nothing behind of a call that was answered.
class CallTable {
 public:
  // usesBefore: as if every slot had been used so often already.
  explicit CallTable(uint32_t usesBefore = 0) : usesBefore_(usesBefore) {}

  // Returns the call's id, or 0 when the table is closed.
  uint64_t add(PendingCall call, Clock::time_point now);
  // Of a response. Nothing if there is no such call any more, or if it went to another peer: see awaitsOther().
  std::optional<PendingCall> take(uint64_t id, int peer);
  // Whether there is such a call, and it went to another peer.
  bool awaitsOther(uint64_t id, int peer) const;
  std::vector<PendingCall> takeExpired(Clock::time_point now);
  std::vector<PendingCall> takeAllOf(int peer);
  // Takes all, and refuses further ones.
  std::vector<PendingCall> close();
  size_t size() const {
    return size_.load();
  }
  size_t sizeOf(int peer) const;
  // Not later than the first deadline; Clock::time_point::max() without any.
  Clock::time_point nextDeadline() const {
    return Clock::time_point(Clock::duration(nextDeadline_.load(std::memory_order_relaxed)));
  }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  struct Slot {
    PendingCall call; // without a future: free
    uint32_t uses = 0;
    uint32_t previous = kNone, next = kNone; // in the list of its timeout
    Clock::time_point deadline;
  };
  struct List {
    uint32_t first = kNone, last = kNone;
  };
  template <class Which>
  std::vector<PendingCall> takeIf(Which which);
  const Slot* find(uint64_t id) const;
  PendingCall release(uint32_t index);
  void link(uint32_t index, List& list);
  void unlink(uint32_t index);

  const uint32_t usesBefore_;
  mutable std::mutex mutex_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> freeSlots_;
  bool closed_ = false;
  std::map<std::chrono::milliseconds, List> lists_;
  std::atomic<Clock::rep> nextDeadline_{Clock::time_point::max().time_since_epoch().count()};
  std::atomic<size_t> size_{0};
};

} // namespace torch_rpc_mpi
