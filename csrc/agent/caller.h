// The caller's side of the agent: requests out, and what becomes of calls.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "agent/agent_options.h"
#include "agent/call_deadlines.h"
#include "agent/call_table.h"
#include "agent/completion.h"
#include "agent/flight_log.h"
#include "agent/membership.h"
#include "agent/outbox.h"
#include "agent/own_calls.h"
#include "agent/server.h"
#include "base/signal_service.h"

namespace torch_rpc_mpi {

// Thread-safe: calls_ guards itself, deadlines_ is the token's, the rest is immutable.
class Caller final : private SendFailureListener {
 public:
  // engine: there when the first call is made.
  Caller(
      const Membership& members,
      Completion& completion,
      Exchange& exchange,
      Outbox& outbox,
      Server& server,
      const std::shared_ptr<Engine>& engine,
      FlightLog& flightLog,
      SignalService signals,
      uint32_t slotUsesBefore,
      std::shared_ptr<Devices> devices,
      AgentOptions::OnLateResponse onLateResponse);

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
    return completion_.completing();
  }
  void forEachUnanswered(c10::function_ref<void(const PendingCall& call)> look) const {
    calls_.forEach(look);
  }
  Clock::time_point nextDeadline() const {
    return calls_.nextDeadline();
  }

  // Whom the server answers that serves this worker's calls to itself.
  SelfCaller& ownCalls() {
    return ownCalls_;
  }

  // Of the token's holder. What completes calls goes to `tasks`; what throws there has lost none.
  // False if the response is to a call that was made to another worker.
  bool onResponse(InboundMessage&& response, std::vector<TaskPtr>& tasks);
  // See CallDeadlines.
  void expire(ProgressToken& token, Clock::time_point now, std::vector<TaskPtr>& tasks) {
    deadlines_.expire(token, now, tasks);
  }
  void onStatement(int source, const Statement& statement) {
    deadlines_.onStatement(source, statement);
  }
  void onPeerEnded(int peer, const std::string& reason);
  // There will be no more calls, and those that are left fail for this reason, unless they have one, in `tasks`. Short
  // of memory for tasks it throws, and the rest fails when this worker leaves.
  void close(const std::string& reason, std::vector<TaskPtr>& tasks);

  // The same of one that leaves, by its thread.
  void close();

 private:
  class ResponseTask;

  PendingCall newCall(int peer, torch::distributed::rpc::MessageType type, std::chrono::milliseconds timeout) const;
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

  const Membership& members_;
  Completion& completion_;
  Exchange& exchange_;
  Outbox& outbox_;
  Server& server_;
  const std::shared_ptr<Engine>& engine_;
  const SignalService signals_;
  const std::shared_ptr<Devices> devices_; // null: none are used
  const AgentOptions::OnLateResponse onLateResponse_;
  CallTable calls_;
  OwnCalls ownCalls_;
  CallDeadlines deadlines_;
};

} // namespace torch_rpc_mpi
