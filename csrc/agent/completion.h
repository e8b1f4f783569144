// Where the futures of calls are completed.
#pragma once

#include <atomic>
#include <exception>
#include <string>

#include <c10/util/FunctionRef.h>

#include "agent/call_table.h"
#include "agent/membership.h"
#include "codec/device_slices.h"
#include "codec/rpc_message.h"

namespace torch_rpc_mpi {

// Note [Completion]
// ~~~~~~~~~~~~~~~~~
// To complete a future runs its callbacks: the user's, and torch's own, of which some throw (RRefContext does when a
// fork request has failed for the last time). So one class completes every future of a call. It is used in tasks of the
// engine, and by a thread that leaves; never in send(), nor under a lock or the progress token. Whatever a callback
// throws ends there, in the log, with the call's name, as in torch's own thread pools.
//
// A call that fails because its peer has ended fails kFailureDelay after it was made, not sooner. torch's retry thread
// (retryExpiredRpcs in rpc_agent.cpp) sends a message and adds its callback when send() has returned; if the future is
// complete by then, it runs the callback itself, and what that throws ends the process.

// Thread-safe: completing_ is an atomic, the rest is immutable.
class Completion {
 public:
  explicit Completion(const Membership& members);

  // With its response, which may be an exception's.
  // streams: in which its tensors arrive, for an agent that uses devices.
  void complete(const PendingCall& call, const RpcMessage& response, const Streams& streams = {}) const noexcept;
  // With the failure that it has, else this one, whose words are made where the lack of memory for them is no harm.
  void fail(const PendingCall& call, c10::function_ref<std::string()> error) const noexcept;
  // Because its time is over, unless it has a failure.
  void expire(const PendingCall& call) const noexcept;

  std::string shutDownText() const; // the failure of what is unanswered when this worker leaves
  // Calls between their answer and the end of their callbacks: those that tasks hold.
  int64_t completing() const {
    return completing_.load();
  }

 private:
  friend class CompletionTask;

  std::string whyLate(const PendingCall& call) const;
  template <typename Body>
  void guarded(const PendingCall& call, const Body& body) const noexcept;

  const Membership& members_;
  const std::exception_ptr noMemory_; // where there is none to say more
  std::atomic<int64_t> completing_{0};
};

} // namespace torch_rpc_mpi
