// Responses for which there was no memory: their callers are told so as soon as there is.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include <c10/util/FunctionRef.h>

namespace torch_rpc_mpi {

// Where the response to a request goes. Used once.
struct ReplyTo {
  int peer;
  uint64_t id;
};

// Thread-safe: mutex_ guards owed_, of which any_ is a hint; paying_ is the token's. Needs memory only when it is made.
class OwedResponses {
 public:
  OwedResponses();

  void add(ReplyTo reply) noexcept;
  // Of the token's holder. tell: a caller. What it throws for want of memory leaves the rest until again().
  bool any() const {
    return any_.load();
  }
  void pay(c10::function_ref<void(ReplyTo reply)> tell);
  void again();

 private:
  std::mutex mutex_;
  std::vector<ReplyTo> owed_;
  std::atomic<bool> any_{false};
  std::vector<ReplyTo> paying_;
};

} // namespace torch_rpc_mpi
