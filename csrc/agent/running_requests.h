// The requests that a worker has begun and not answered, so that it can say what it is busy with.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include <c10/util/FunctionRef.h>

#include "base/clock.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards the lists, each in the order in which the requests came to it, and the index of those
// whose functions have returned futures: there may be hundreds of thousands of them.
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
    void append(); // with the mutex

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

  // Shown to `look`, under the lock: each of them, first those that have a thread; the first that has one, if any does;
  // that of a call, if it is there.
  void forEach(c10::function_ref<void(const Request&)> look) const;
  void oldest(c10::function_ref<void(const Request&)> look) const;
  void find(int peer, uint64_t callId, c10::function_ref<void(const Request&)> look) const;

 private:
  struct List {
    Request* first = nullptr;
    Request* last = nullptr;
  };
  struct HashOfCall {
    size_t operator()(const std::pair<int, uint64_t>& call) const {
      return std::hash<uint64_t>()(call.second * 1000003 + static_cast<uint64_t>(call.first));
    }
  };
  List& listOf(const Request& request) {
    return request.promised_ ? promised_ : withThread_;
  }

  mutable std::mutex mutex_;
  List withThread_, promised_;
  std::unordered_map<std::pair<int, uint64_t>, const Request*, HashOfCall> promisedByCall_;
};

} // namespace torch_rpc_mpi
