// The requests that a worker has begun and not answered, so that it can say what it is busy with.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include <c10/util/FunctionRef.h>

#include "base/clock.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards the list, which is in the order in which the requests began.
class RunningRequests {
 public:
  // One of them, from its beginning to its end, which its thread runs, or for which its function has returned a future.
  class Request {
   public:
    Request(RunningRequests& all, int peer, uint64_t callId);
    // Goes on without a thread; `before` is about to end.
    Request(const Request& before);
    ~Request() {
      end();
    }
    void end();
    Request& operator=(const Request&) = delete;

    Clock::time_point since() const {
      return since_;
    }
    bool promised() const {
      return promised_;
    }
    int peer() const {
      return peer_;
    }
    uint64_t callId() const {
      return callId_;
    }
    // Empty where that is not known, or not yet.
    std::string_view function() const {
      return {function_.data(), functionBytes_.load(std::memory_order_acquire)};
    }

   private:
    friend class RunningRequests;
    void append();

    RunningRequests* all_; // null: it has ended
    const int peer_;
    const uint64_t callId_;
    const Clock::time_point since_;
    const bool promised_;
    Request* previous_ = nullptr;
    Request* next_ = nullptr;
    // Written once, by the thread that runs it, before the number of its bytes is.
    std::array<char, 80> function_;
    std::atomic<size_t> functionBytes_{0};
  };

  // Names the function that the request of this thread runs, if it runs one: called where the name is at hand, since
  // who asks for it later has no GIL. Names that are too long are cut.
  static void nameFunction(std::string_view module, std::string_view function);

  // Each of them is shown to `look`, under the lock, until that returns true.
  void search(c10::function_ref<bool(const Request&)> look) const;

 private:
  mutable std::mutex mutex_;
  Request* first_ = nullptr;
  Request* last_ = nullptr;
};

} // namespace torch_rpc_mpi
