// The caller's side of draining: a thread that waits for all ranks to agree that no call is in flight.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>

#include "agent/drain.h"
#include "base/signal_service.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards agreed_ and failure_; request_ and last_ are atomics; the rest is the token's holder's.
class Join {
 public:
  enum class Result { kAgreed, kFailed, kTimedOut };

  Join(int rank, int size, Drain::Send send) : drain_(rank, size, std::move(send)) {}

  // One thread at a time. seconds: 0 for no limit. `last`: who agrees leaves. `wake`: has the token's holder look.
  // Throws what a signal throws. A wait that ended otherwise than by agreement is withdrawn, and a later one needs an
  // agreement of its own; it fails if the others have left by that of an earlier one.
  Result wait(const SignalService& signals, float seconds, bool last, const std::function<void()>& wake);
  // Any thread: there will be no agreement any more. The first reason sticks.
  void fail(const std::string& reason);
  std::string failure() const;

  // The token's holder, each turn. `idle` is asked only while somebody joins.
  void advance(ProgressToken& token, const std::function<bool()>& idle, const std::function<DrainCounts()>& counts);
  // Whether this rank has reported and is to hear from its parent what the root makes of it. For the token's holder.
  bool awaitsVerdict() const {
    return drain_.joined() && drain_.reported();
  }
  // A drain frame. Returns why it makes no sense, or an empty text.
  std::string onFrame(ProgressToken& token, int source, ConstSpan body) {
    return drain_.onFrame(token, source, body);
  }

 private:
  enum class Request { kNone, kJoin, kWithdraw };
  void missed();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool agreed_ = false;
  std::string failure_;
  std::atomic<Request> request_{Request::kNone};
  std::atomic<bool> last_{false};

  Drain drain_;
  uint32_t agreements_ = 0; // of the drain, when the present wait began or ended
};

} // namespace torch_rpc_mpi
