// The RpcAgent of backend "MPI".
#pragma once

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/csrc/distributed/rpc/rpc_agent.h>

#include "agent/call_table.h"
#include "agent/completion.h"
#include "agent/join.h"
#include "agent/membership.h"
#include "base/signal_service.h"
#include "codec/message_codec.h"
#include "engine/engine.h"
#include "peer/exchange.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

struct AgentOptions {
  int numWorkerThreads = 16;
  std::chrono::milliseconds rpcTimeout{60000};
  ExchangeOptions exchange;
  int coresToSpare = 1; // see Note [How many at once]
  bool crowded = false; // more ranks on this host than cores that this one may use
  int ranksOnHost = 1;
  std::chrono::nanoseconds spinTime = std::chrono::milliseconds(1);
  std::chrono::nanoseconds maxSleep = std::chrono::milliseconds(1);
  std::chrono::nanoseconds maxRest = EngineOptions().maxRest;
  std::chrono::milliseconds watchInterval{100}; // how often to look whether neighbours are alive
  std::function<void(const std::function<void()>& body)> threadHook = [](const std::function<void()>& body) { body(); };
  SignalService signals; // of threads that wait here
  MakeEngine makeEngine = makeThreadedEngine;
};

// Thread-safe. Members:
//   options_, transport_, completion_ are immutable after construction;
//   outboxMutex_ guards outbox_ and owedErrors_ (outboxFilled_ is a hint);
//   arrivals_, nextTrim_, nextWatch_, endedProcesses_ are guarded by the progress token;
//   metricsMutex_ guards the GIL wait, brokenMutex_ brokenReason_;
//   members_, calls_, exchange_, engine_ and join_ guard themselves; the rest are atomics.
class MpiAgent final : public torch::distributed::rpc::RpcAgent,
                       public std::enable_shared_from_this<MpiAgent>,
                       private EngineDriver,
                       private ExchangeListener,
                       private SendFailureListener {
 public:
  using WorkerInfo = torch::distributed::rpc::WorkerInfo;

  MpiAgent(
      std::unique_ptr<Transport> transport,
      std::vector<GroupMember> members,
      std::unique_ptr<torch::distributed::rpc::RequestCallback> callback,
      AgentOptions options);
  ~MpiAgent() override;

  JitFuturePtr send(
      const WorkerInfo& to,
      RpcMessage message,
      const float rpcTimeoutSeconds = torch::distributed::rpc::kUnsetRpcTimeout,
      const torch::distributed::rpc::DeviceMap& deviceMap = {}) override;

  // Waits until no call is in flight between any two ranks, all of which must call it. timeout: seconds, 0 for none.
  // Throws when a peer has left, on timeout, and what a signal throws; it can then be called again.
  void join(bool shutdown = false, float timeout = 0) override;
  void sync() override {}
  void startImpl() override;
  // After join(shutdown=true): frees everything. Without: says goodbye to the peers and stops; local and bounded. What
  // a signal throws meanwhile is thrown when all is done.
  void shutdownImpl() override;

  // For a call that its thread will wait for at once, see Note [Guests]: expectAnswer(true) before it is sent, then
  // driveUntil() with a future that completes when the call does. It may return before that. Neither does anything on
  // an engine thread, which is no guest.
  void expectAnswer(bool expected);
  void driveUntil(const torch::distributed::rpc::JitFuture& future);

  // While it lives, send() waits for the answer to the first call that this thread makes, as far as the thread can do
  // so as a guest or has signals to serve. For code of torch that sends one and then waits at once, in its own way.
  class AnswerInSend {
   public:
    explicit AnswerInSend(MpiAgent& agent);
    ~AnswerInSend();
    AnswerInSend(const AnswerInSend&) = delete;
    AnswerInSend& operator=(const AnswerInSend&) = delete;

   private:
    MpiAgent& agent_;
  };

  // While it lives, the request that this thread sends is the second attempt of one that its callee did not run.
  class SecondAttempt {
   public:
    SecondAttempt();
    ~SecondAttempt();
    SecondAttempt(const SecondAttempt&) = delete;
    SecondAttempt& operator=(const SecondAttempt&) = delete;
  };

  // Whether calls of this process are unanswered.
  bool awaitsAnswers() const override;

  // Throws in a child process made by fork().
  void checkNotForked() const;

  using RpcAgent::getWorkerInfo;
  const WorkerInfo& getWorkerInfo(const std::string& workerName) const override;
  const WorkerInfo& getWorkerInfo(torch::distributed::rpc::worker_id_t id) const override;
  std::vector<WorkerInfo> getWorkerInfos() const override;
  std::unordered_map<std::string, std::string> getMetrics() override;
  void addGilWaitTime(const std::chrono::microseconds gilWaitTime) override;
  // The workers to which calls can no longer be answered, in the order in which they were lost; this one itself if its
  // transport is broken.
  std::vector<Membership::Loss> lostWorkers() const {
    return members_.lost();
  }

 private:
  class RequestTask;
  class CompletionTask;
  class ResponseTask;
  class ErrorTask;
  class LocalRequestTask;
  class ReleaseTask;

  // EngineDriver
  bool turn(ProgressToken& token, std::vector<TaskPtr>& tasks) override;
  bool hasQueued() const override;
  Clock::time_point nextDeadline() const override;
  bool rests() const override;
  void onBroken(const std::string& reason) noexcept override;
  // ExchangeListener
  std::unique_ptr<BulkTarget> makeTarget(int source, const FrameHeader& header, ConstSpan body) override;
  void onMessage(ProgressToken& token, InboundMessage message) override;
  void onStrayFrame(int source, const std::string& reason) override;
  std::string failureText(int peer, const std::string& cause) const override;
  void onPeerEnded(ProgressToken& token, int peer, const std::string& reason) override;
  // SendFailureListener
  void onSendFailed(FrameKind kind, int peer, uint64_t callId, const std::string& reason) noexcept override;

  // Calling (caller's side), agent/call.cpp
  std::chrono::milliseconds timeoutOf(float seconds) const;
  std::string notRunningText(torch::distributed::rpc::MessageType type) const;
  void checkUsable(const torch::distributed::rpc::Message& message) const;
  void sendToPeer(int peer, uint64_t id, RpcMessage message);
  void sendToSelf(uint64_t id, RpcMessage message);
  void onResponse(ProgressToken& token, InboundMessage message);
  bool failLater(PendingCall call, const std::string& reason);
  void expire(Clock::time_point now);

  // Serving (callee's side), agent/serve.cpp
  // Takes what makes the response, and sees to it if that throws. Never throws.
  using Respond = std::function<void(const std::function<RpcMessage()>& response)>;
  void serve(InboundMessage inbound);
  JitFuturePtr process(torch::distributed::rpc::Message& request);
  void run(RpcMessage request, const Respond& respond);
  void respond(int peer, uint64_t id, RpcMessage response);
  void oweError(int peer, uint64_t id, const std::exception& error) noexcept;
  void payErrors(ProgressToken& token, std::vector<std::pair<int, uint64_t>> owed);
  RpcMessage responseOf(torch::distributed::rpc::JitFuture& future, int64_t id) const;
  RpcMessage errorResponse(const std::string& what, int64_t id) const;

  void submit(OutboundPtr message, bool expectsReply);
  bool postOutbox(ProgressToken& token); // whether there was something
  bool progress(ProgressToken& token);   // a turn, but for handing over arrivals_
  bool idle(ProgressToken& token) const;
  void watchNeighbours(ProgressToken& token, Clock::time_point now);
  // Of leaving; what a signal throws meanwhile cuts them short and is kept.
  bool stopEngine(std::exception_ptr& interrupted); // whether all its threads have ended
  void flush(std::exception_ptr& interrupted);
  void serveSignals(std::exception_ptr& interrupted);
  void sayGoodbye();
  std::string whatJoinWaitsFor() const;
  std::string shutDownText() const;

  const AgentOptions options_;
  const std::unique_ptr<Transport> transport_;
  const int rank_;
  Membership members_;
  const Completion completion_;
  CallTable calls_;
  Exchange exchange_;
  const std::shared_ptr<Engine> engine_;
  Join join_;

  std::mutex outboxMutex_;
  std::vector<OutboundPtr> outbox_;
  std::vector<std::pair<int, uint64_t>> owedErrors_; // peer and call; see oweError()
  std::atomic<bool> outboxFilled_{false};
  std::vector<TaskPtr> arrivals_; // made during a turn
  Clock::time_point nextTrim_ = Clock::now();
  Clock::time_point nextWatch_ = Clock::now();
  std::vector<int> endedProcesses_; // of neighbours, found at the last look
  std::atomic<bool> rests_{false};

  mutable std::mutex brokenMutex_;
  std::string brokenReason_;        // of the transport
  std::atomic<bool> agreed_{false}; // join(shutdown=true) succeeded
  std::atomic<bool> started_{false};

  std::atomic<int64_t> serving_{0};      // requests between arrival and response
  std::atomic<int64_t> completing_{0};   // calls between their answer and the end of their callbacks
  std::atomic<int64_t> servingAsync_{0}; // of them, those whose function returned a future

  std::mutex metricsMutex_;
  uint64_t gilWaits_ = 0;
  uint64_t gilWaitMicroseconds_ = 0;
};

} // namespace torch_rpc_mpi
