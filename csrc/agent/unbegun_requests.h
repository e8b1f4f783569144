// The requests that have arrived and not begun, so that a caller that has given one up can call it off.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "codec/device_slices.h"
#include "codec/rpc_message.h"
#include "engine/task.h"

namespace torch_rpc_mpi {

struct ArrivedRequest {
  InboundMessage inbound;
  RpcMessage own;                                        // instead, where this worker calls itself …
  Clock::time_point deadline = Clock::time_point::max(); // … until when that call waits …
  Streams streams = {};                                  // … and in which its tensors arrive

  Task::Kind kind() const; // of the task that runs it
};

// Thread-safe: mutex_ guards the lists; forgotten_ is the token's.
class UnbegunRequests {
 public:
  explicit UnbegunRequests(size_t callers) : lists_(callers), forgotten_(callers) {}

  // One of them, from its making until it is taken.
  class Entry {
   public:
    // task: that will take it.
    Entry(UnbegunRequests& all, const Task& task, int source, uint64_t id, ArrivedRequest&& request)
        : all_(all),
          task_(task),
          source_(source),
          id_(id),
          request_(std::move(request)) {
      const std::lock_guard<std::mutex> lock(all_.mutex_);
      List& list = all_.lists_[source_];
      previous_ = list.last;
      (previous_ == nullptr ? list.first : previous_->next_) = this;
      list.last = this;
    }
    ~Entry() {
      if (!asked_) {
        (void)take();
      }
    }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;

    uint64_t id() const {
      return id_;
    }
    // Nothing if it was taken before.
    std::optional<ArrivedRequest> take() {
      asked_ = true;
      const std::lock_guard<std::mutex> lock(all_.mutex_);
      return takeLocked();
    }

   private:
    friend class UnbegunRequests;
    std::optional<ArrivedRequest> takeLocked() { // with the mutex
      if (std::exchange(taken_, true)) {
        return std::nullopt;
      }
      List& list = all_.lists_[source_];
      (previous_ == nullptr ? list.first : previous_->next_) = next_;
      (next_ == nullptr ? list.last : next_->previous_) = previous_;
      return std::move(request_);
    }

    UnbegunRequests& all_;
    const Task& task_;
    const int source_;
    const uint64_t id_;
    ArrivedRequest request_;
    bool asked_ = false; // take() was called; of the owner alone, and so without the lock
    bool taken_ = false;
    Entry *previous_ = nullptr, *next_ = nullptr; // in the list of the caller
  };

  // Of the token's holder: the caller does not wait for that call any more. Takes its request, or if it may still come
  // remembers that for wasForgotten(), to be asked of each that arrives. comes: something of that caller has arrived in
  // part, this request perhaps.
  std::optional<ArrivedRequest> forget(int source, uint64_t id, bool comes);
  bool wasForgotten(int source, uint64_t id) {
    auto& forgotten = forgotten_[source];
    return !forgotten.empty() && forgotten.erase(id) > 0;
  }

  // The task that will take it, or null. Not to be touched: it may begin, and end, at any time.
  const Task* taskOf(int source, uint64_t id) const;

 private:
  struct List { // of one caller, in the order of their arrival
    Entry *first = nullptr, *last = nullptr;
  };
  Entry* find(int source, uint64_t id) const; // with the mutex

  mutable std::mutex mutex_;
  std::vector<List> lists_;                             // by caller
  std::vector<std::unordered_set<uint64_t>> forgotten_; // by caller: calls that come, perhaps
};

} // namespace torch_rpc_mpi
