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
#include "agent/drain.h"
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
};

// Who is in the group, by rank.
struct GroupMember {
  std::string name;
  std::string host;
};

// Thread-safe. Members:
//   workers_, hosts_, idsByName_, options_, transport_ are immutable after construction;
//   outbox_ is guarded by outboxMutex_ (outboxFilled_ is a hint); arrivals_, nextTrim_, nextWatch_, ended_,
//   drain_ by the progress token;
//   joinMutex_ guards agreements_ and joinFailure_; metricsMutex_ the GIL wait; goneMutex_ the reasons in gone_;
//   calls_, exchange_ and engine_ guard themselves; the rest are atomics.
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

  // While it lives, send() returns the answer to the first call that this thread makes, not before it is there. For
  // code of torch that sends one and waits at once, in its own way: so the thread drives progress and serves signals.
  class AnswerInSend {
   public:
    explicit AnswerInSend(MpiAgent& agent);
    ~AnswerInSend();
    AnswerInSend(const AnswerInSend&) = delete;
    AnswerInSend& operator=(const AnswerInSend&) = delete;

   private:
    MpiAgent& agent_;
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
  void onBadFrame(int source, const std::string& reason) override;
  void onPeerGone(ProgressToken& token, int peer, const std::string& reason) override;
  // SendFailureListener
  void onSendFailed(FrameKind kind, int peer, uint64_t callId, const std::string& reason) noexcept override;

  // Calling (caller's side), agent/call.cpp
  std::chrono::milliseconds timeoutOf(float seconds) const;
  std::string notRunningText(torch::distributed::rpc::MessageType type) const;
  void checkUsable(const torch::distributed::rpc::Message& message) const;
  void sendToPeer(int peer, uint64_t id, RpcMessage message);
  void sendToSelf(uint64_t id, RpcMessage message);
  void expire(Clock::time_point now);
  std::string describe(int rank) const;

  // Serving (callee's side), agent/serve.cpp
  void serve(InboundMessage inbound);
  JitFuturePtr process(torch::distributed::rpc::Message& request);
  void run(RpcMessage request, const std::function<void(RpcMessage)>& respond);
  void respond(int peer, uint64_t id, RpcMessage response);
  RpcMessage responseOf(torch::distributed::rpc::JitFuture& future, int64_t id) const;
  RpcMessage errorResponse(const std::string& what, int64_t id) const;

  void submit(OutboundPtr message, bool expectsReply);
  bool progress(ProgressToken& token); // a turn, but for handing over arrivals_
  bool idle(ProgressToken& token) const;
  void advanceDrain(ProgressToken& token);
  void watchNeighbours(ProgressToken& token, Clock::time_point now);
  void joinFailed(const std::string& reason);
  // Of leaving; what a signal throws meanwhile cuts them short and is kept.
  bool stopEngine(std::exception_ptr& interrupted); // whether all its threads have ended
  void flush(std::exception_ptr& interrupted);
  void serveSignals(std::exception_ptr& interrupted);
  void sayGoodbye();
  void failAllCalls(const std::string& reason);
  std::string whatJoinWaitsFor() const;
  std::string shutDownText() const;

  const AgentOptions options_;
  std::vector<WorkerInfo> workers_;
  std::vector<std::string> hosts_;
  std::unordered_map<std::string, int> idsByName_;
  const std::unique_ptr<Transport> transport_;
  const int rank_;
  CallTable calls_;
  Exchange exchange_;
  const std::shared_ptr<Engine> engine_;
  Drain drain_;

  std::mutex outboxMutex_;
  std::vector<OutboundPtr> outbox_;
  std::atomic<bool> outboxFilled_{false};
  std::vector<TaskPtr> arrivals_; // made during a turn
  Clock::time_point nextTrim_ = Clock::now();
  Clock::time_point nextWatch_ = Clock::now();
  std::vector<int> ended_; // neighbours that were found so at the last look
  std::atomic<bool> rests_{false};

  mutable std::mutex goneMutex_;
  std::unordered_map<int, std::string> gone_;
  std::atomic<size_t> goneCount_{0};

  std::mutex joinMutex_;
  std::condition_variable joinCv_;
  uint32_t agreements_ = 0;
  std::string joinFailure_;
  std::atomic<bool> joinRequested_{false};
  std::atomic<bool> joining_{false};
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
