// Calls that wait for their response: id to future and deadline.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/ivalue.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/distributed/rpc/message.h>

#include "base/clock.h"

namespace torch_rpc_mpi {

using JitFuturePtr = c10::intrusive_ptr<c10::ivalue::Future>;

// A call that fails because its peer has ended fails so long after it was made, not sooner: Note [Completion].
inline constexpr std::chrono::milliseconds kFailureDelay{50};

// A text that calls share; without memory for it, one that was made when the library was loaded.
std::shared_ptr<const std::string> sharedText(const std::string& text) noexcept;

struct PendingCall {
  JitFuturePtr future;
  uint64_t id = 0; // given by the table
  int peer = 0;
  torch::distributed::rpc::MessageType type = torch::distributed::rpc::MessageType::UNKNOWN;
  std::chrono::milliseconds timeout{0}; // 0: none
  Clock::time_point made;
  bool delayed = false;                            // by a test: its request arrives and is run, however late
  std::shared_ptr<const std::string> failure = {}; // with which it ends when its time is over, instead of "timed out"
  std::shared_ptr<const std::string> whyLate = {}; // if it times out: see Note [Late calls]
};

// So long before its time is over a call is late; 0 for one whose time is too short to ask what became of it.
constexpr std::chrono::milliseconds lateBefore(std::chrono::milliseconds timeout) {
  using std::chrono::milliseconds;
  if (timeout < milliseconds(500)) {
    return timeout < milliseconds(100) ? milliseconds(0) : milliseconds(10);
  }
  return timeout < milliseconds(2000) ? milliseconds(100) : milliseconds(500);
}

// Thread-safe: mutex_ guards all but nextDeadline_ and size_, which are hints for others. Every call is taken exactly
// once, by whoever completes it; futures are never completed in here. Only add() needs memory: no call is lost for want
// of it.
//
// An id names a slot and how often the slot was used, so that a late response cannot complete another call; no id is 0,
// however often. What is due next is the top of a heap, of which nothing is left behind by a call that was answered:
// adding, taking and expiring take the logarithm of the calls that wait, however many different timeouts they have.
// (A list for each timeout took longer with each: with 2000 of them calls expired 0.4 s late.)
class CallTable {
 public:
  // usesBefore: as if every slot had been used so often already.
  explicit CallTable(uint32_t usesBefore = 0);

  // Returns the call's id, or 0 when the table is closed.
  uint64_t add(PendingCall call, Clock::time_point now);
  // Of a response. Nothing if there is no such call any more, or if it went to another peer: see awaitsOther().
  std::optional<PendingCall> take(uint64_t id, int peer);
  // Whether there is such a call, and it went to another peer.
  bool awaitsOther(uint64_t id, int peer) const;
  // What is due first, each once: that a call is late, which stays, or that its time is over, and then it is taken.
  struct Due {
    uint64_t id = 0;
    int peer = 0;
    std::optional<PendingCall> expired;
  };
  std::optional<Due> takeDue(Clock::time_point now);
  void explain(uint64_t id, int peer, const std::shared_ptr<const std::string>& whyLate);
  // Their time is over soon, see kFailureDelay; until then nobody else takes them. False if there is no such call.
  bool failLater(uint64_t id, int peer, const std::shared_ptr<const std::string>& failure, Clock::time_point now);
  void failAllOf(int peer, const std::shared_ptr<const std::string>& failure, Clock::time_point now);
  // Refuses further calls.
  void close();
  // Of a closed table, one call; nothing if there are no more.
  std::optional<PendingCall> takeAny();
  size_t size() const {
    return size_.load();
  }
  size_t sizeOf(int peer) const;
  // Shows each call to `look`, which must not use the table.
  void forEach(c10::function_ref<void(const PendingCall& call)> look) const;
  // Not later than the first deadline; Clock::time_point::max() without any.
  Clock::time_point nextDeadline() const {
    return Clock::time_point(Clock::duration(nextDeadline_.load(std::memory_order_relaxed)));
  }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  struct Slot {
    PendingCall call; // without a future: free
    uint32_t uses = 0;
    uint32_t place = kNone; // in queue_; none: it has no timeout
    bool late = false;
  };
  struct Waiting {
    Clock::time_point due;
    uint64_t number = 0; // of equal times the first comes first
    uint32_t index = 0;  // of its slot
    bool operator<(const Waiting& other) const {
      return due != other.due ? due < other.due : number < other.number;
    }
  };
  const Slot* find(uint64_t id) const;
  void fail(uint32_t index, const std::shared_ptr<const std::string>& failure, Clock::time_point now);
  void start(uint32_t index, Clock::time_point due);
  void stop(uint32_t index);
  PendingCall release(uint32_t index);
  void put(size_t place, const Waiting& waiting);
  void rise(size_t place, const Waiting& waiting);
  void sink(size_t place, const Waiting& waiting);

  const uint32_t usesBefore_;
  mutable std::mutex mutex_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> freeSlots_;
  bool closed_ = false;
  uint32_t closedUpTo_ = 0;    // slots before are empty for good
  std::vector<Waiting> queue_; // a heap, with room for all slots
  uint64_t started_ = 0;
  std::atomic<Clock::rep> nextDeadline_{Clock::time_point::max().time_since_epoch().count()};
  std::atomic<size_t> size_{0};
};

} // namespace torch_rpc_mpi
