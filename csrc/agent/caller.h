// The caller's side of the agent: requests out, and what becomes of calls.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "agent/call_table.h"
#include "agent/completion.h"
#include "agent/flight_log.h"
#include "agent/late_calls.h"
#include "agent/membership.h"
#include "agent/outbox.h"
#include "agent/server.h"
#include "base/signal_service.h"

namespace torch_rpc_mpi {

// Thread-safe: calls_ guards itself, completing_ is an atomic, late_ is the token's, the rest is immutable.
class Caller final : public SelfCaller, private SendFailureListener {
 public:
  // engine: there when the first call is made.
  Caller(
      const Membership& members,
      const Completion& completion,
      Exchange& exchange,
      Outbox& outbox,
      Server& server,
      const std::shared_ptr<Engine>& engine,
      FlightLog& flightLog,
      SignalService signals,
      uint32_t slotUsesBefore,
      std::shared_ptr<Devices> devices);

  // A call to a worker, this one perhaps. timeout: 0 for none; it begins now. Null if there are no more calls: see
  // close(). later: of a test that delays the message. It is given what sends it, which may be called by any thread.
  using Later = std::function<void(std::function<void()> send)>;
  JitFuturePtr call(
      int peer,
      RpcMessage message,
      std::chrono::milliseconds timeout,
      std::shared_ptr<OutboundSlices> onDevices = nullptr,
      const Later& later = {});
  // One that is not sent and fails, as a call to a peer that has ended does: see Note [Completion].
  JitFuturePtr failingCall(int peer, torch::distributed::rpc::MessageType type, const std::string& failure);

  // For a call that its thread will wait for at once, see Note [Guests]: expectAnswer(true) before it is sent, then
  // driveUntil() with a future that completes when the call does. It may return before that. Neither does anything on
  // an engine thread, which is no guest.
  void expectAnswer(bool expected);
  void driveUntil(const c10::ivalue::Future& future);

  // While it lives, call() waits for the answer to the first call that this thread makes, as far as the thread can do
  // so as a guest or has signals to serve. For code of torch that sends one and then waits at once, in its own way.
  class AnswerInSend {
   public:
    explicit AnswerInSend(Caller& caller);
    ~AnswerInSend();
    AnswerInSend(const AnswerInSend&) = delete;
    AnswerInSend& operator=(const AnswerInSend&) = delete;

   private:
    Caller& caller_;
  };
  // While it lives, the request that this thread sends is the second attempt of one that its callee did not run.
  class SecondAttempt {
   public:
    SecondAttempt();
    ~SecondAttempt();
    SecondAttempt(const SecondAttempt&) = delete;
    SecondAttempt& operator=(const SecondAttempt&) = delete;
  };

  size_t unanswered() const {
    return calls_.size();
  }
  size_t unansweredBy(int peer) const {
    return calls_.sizeOf(peer);
  }
  int64_t completing() const { // calls between their answer and the end of their callbacks
    return completing_.load();
  }
  void forEachUnanswered(c10::function_ref<void(const PendingCall& call)> look) const {
    calls_.forEach(look);
  }
  Clock::time_point nextDeadline() const {
    return calls_.nextDeadline();
  }

  // Of the token's holder. What completes calls goes to `tasks`; what throws there has lost none.
  // False if the response is to a call that was made to another worker.
  bool onResponse(InboundMessage response, std::vector<TaskPtr>& tasks);
  // Some of those whose time is over; nextDeadline() tells whether there are more.
  void expire(ProgressToken& token, Clock::time_point now, std::vector<TaskPtr>& tasks);
  void onStatement(int source, const Statement& statement);
  void onPeerEnded(int peer, const std::string& reason);

  std::string shutDownText() const; // the reason when this worker leaves
  // There will be no more calls; those that are left fail with the reason, unless they have one, here or in `tasks`.
  // Short of memory for tasks it throws, and the rest fails when this worker leaves.
  void close(const std::string& reason);
  void close(const std::string& reason, std::vector<TaskPtr>& tasks);

 private:
  class CompletionTask;
  class ResponseTask;
  class OwnResponseTask;
  class CopiedTask;
  class ExpiryTask;

  void onOwnResponse(uint64_t id, MakeResponse response) noexcept override;
  void onOwnResponse(uint64_t id, RpcMessage response, const OutboundSlices& onDevices) override;
  PendingCall newCall(int peer, torch::distributed::rpc::MessageType type, std::chrono::milliseconds timeout) const;
  void postOwn(
      uint64_t id,
      const torch::distributed::rpc::Message& message,
      const OutboundSlices& onDevices,
      Clock::time_point deadline);
  void whenCopied(OwnCopy copy, TaskPtr task);
  void onSendFailed(FrameKind kind, int peer, uint64_t callId, const std::string& reason) noexcept override;
  void dispatch(
      int peer,
      uint64_t id,
      RpcMessage message,
      std::shared_ptr<OutboundSlices> onDevices,
      Clock::time_point deadline);
  void sendToPeer(
      int peer,
      uint64_t id,
      RpcMessage message,
      std::shared_ptr<OutboundSlices> onDevices,
      Clock::time_point deadline);
  void askAfterLate(ProgressToken& token);
  OutboundPtr forget(ProgressToken& token, const PendingCall& call) noexcept;

  const Membership& members_;
  const Completion& completion_;
  Exchange& exchange_;
  Outbox& outbox_;
  Server& server_;
  const std::shared_ptr<Engine>& engine_;
  FlightLog& flightLog_;
  const SignalService signals_;
  const std::shared_ptr<Devices> devices_; // null: none are used
  CallTable calls_;
  struct Late {
    int peer;
    uint64_t id;
  };
  std::vector<Late> late_; // in this turn
  std::atomic<int64_t> completing_{0};
};

} // namespace torch_rpc_mpi
