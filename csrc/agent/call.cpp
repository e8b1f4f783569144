// The caller's side of the agent: requests out, and what becomes of calls that get no answer.
#include <cmath>

#include <torch/csrc/distributed/rpc/utils.h>

#include "agent/engine_work.h"
#include "agent/future_wait.h"
#include "agent/mpi_agent.h"
#include "agent/tasks.h"
#include "base/deadline.h"
#include "host/fork_guard.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// The call that this thread made last and will drive.
thread_local JitFuturePtr awaited;
// Whether send() is to wait for it; see AnswerInSend.
thread_local bool answersInSend = false;

// See SecondAttempt.
thread_local bool sendsAgain = false;

// A guest is announced for one call. Whatever becomes of that, it does not stay so.
struct GuestAnnouncement {
  GuestAnnouncement() = default;
  ~GuestAnnouncement() {
    Engine::announceGuest(false);
  }
  GuestAnnouncement(const GuestAnnouncement&) = delete;
  GuestAnnouncement& operator=(const GuestAnnouncement&) = delete;
};

std::string timeoutText(std::chrono::milliseconds timeout) {
  std::string text = rpc::kRpcTimeoutErrorStr;
  return text.replace(text.find("{}"), 2, std::to_string(timeout.count()));
}

} // namespace

std::chrono::milliseconds MpiAgent::timeoutOf(float seconds) const {
  const double limit =
      seconds == rpc::kUnsetRpcTimeout ? std::chrono::duration<double>(getRpcTimeout()).count() : double{seconds};
  TORCH_CHECK(limit >= 0, "An RPC timeout must not be negative, but is ", limit, " s. Give seconds, or 0 for no limit");
  if (limit == 0 || limit > kLongestWait) {
    return std::chrono::milliseconds(0);
  }
  // At least 1 ms: the smallest timeout that a user can give is not "none".
  return std::chrono::milliseconds(std::max<int64_t>(std::llround(limit * rpc::kSecToMsConversion), 1));
}

void MpiAgent::checkNotForked() const {
  TORCH_CHECK(
      !inForkedChild(),
      "RPC cannot be used in a child process made by fork(): RPC was initialized in its parent, and its threads and "
      "its MPI stay there. Start such processes with the 'spawn' or 'forkserver' method, or do not call RPC in them "
      "(for a DataLoader: multiprocessing_context='forkserver')");
}

std::string MpiAgent::notRunningText(rpc::MessageType type) const {
  {
    const std::lock_guard<std::mutex> lock(brokenMutex_);
    if (!brokenReason_.empty()) {
      return brokenReason_; // whatever is asked for later: the first reason is the one that helps
    }
  }
  return c10::str(
      "Node ", rank_, " tried to send() a message of type ", type, " but RPC is no longer running on this node.");
}

void MpiAgent::checkUsable(const rpc::Message& message) const {
  TORCH_CHECK(message.isRequest(), "MpiAgent::send(..) is only for sending requests.");
  checkNotForked();
  TORCH_CHECK(rpcAgentRunning_.load(), notRunningText(message.type()));
}

JitFuturePtr MpiAgent::send(
    const WorkerInfo& to,
    RpcMessage message,
    const float rpcTimeoutSeconds,
    const rpc::DeviceMap& /*deviceMap*/) {
  const GuestAnnouncement announcement;
  checkUsable(*message);
  const int peer = getWorkerInfo(to.id_).id_;
  PendingCall call;
  call.future = c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get());
  call.peer = peer;
  call.type = message->type();
  call.timeout = timeoutOf(rpcTimeoutSeconds);
  call.made = Clock::now();
  JitFuturePtr future = call.future;
  if (const auto reason = members_.whyLost(peer)) {
    TORCH_CHECK(failLater(std::move(call), *reason), notRunningText(message->type()));
    return future;
  }
  if (Engine::guestAnnounced()) {
    // A call to oneself another thread runs, and is there as soon as this one would be.
    Engine::announceGuest(peer != rank_);
    awaited = peer != rank_ ? future : nullptr;
  }
  const auto made = call.made;
  const uint64_t id = calls_.add(std::move(call), made);
  TORCH_CHECK(id != 0, notRunningText(message->type()));
  message->setId(static_cast<int64_t>(id));
  try {
    const EngineWork work;
    if (peer == rank_) {
      sendToSelf(id, std::move(message));
    } else {
      sendToPeer(peer, id, std::move(message));
    }
  } catch (...) {
    calls_.take(id, peer);
    throw;
  }
  Engine::announceGuest(false); // before it drives: what its callbacks send is announced anew
  if (std::exchange(answersInSend, false)) {
    driveUntil(*future);
    serveUntilCompleted(options_.signals, *future);
  }
  return future;
}

// The thread drives only where its answer is the next to come. A guest hands other completions to a thread that must be
// woken for them, such as the owner's answer to the remote() before a to_here(): 15 us more than without a guest.
MpiAgent::AnswerInSend::AnswerInSend(MpiAgent& agent) : agent_(agent) {
  agent_.expectAnswer(!agent_.awaitsAnswers());
  answersInSend = true;
}

MpiAgent::AnswerInSend::~AnswerInSend() {
  agent_.expectAnswer(false);
  answersInSend = false;
}

MpiAgent::SecondAttempt::SecondAttempt() {
  sendsAgain = true;
}

MpiAgent::SecondAttempt::~SecondAttempt() {
  sendsAgain = false;
}

void MpiAgent::expectAnswer(bool expected) {
  if (engine_->onEngineThread()) {
    return; // so send() leaves `awaited` empty, and driveUntil() has nothing to drive for
  }
  awaited.reset();
  Engine::announceGuest(expected);
}

void MpiAgent::driveUntil(const rpc::JitFuture& future) {
  if (const JitFuturePtr call = std::exchange(awaited, nullptr)) {
    const EngineWork work;
    engine_->driveFor(call.get(), [&] { return future.completed(); });
  }
}

void MpiAgent::sendToSelf(uint64_t id, RpcMessage message) {
  serving_.fetch_add(1);
  try {
    engine_->post(std::make_unique<LocalRequestTask>(*this, id, copyMessage(*message)));
  } catch (...) {
    serving_.fetch_sub(1);
    throw;
  }
}

void MpiAgent::sendToPeer(int peer, uint64_t id, RpcMessage message) {
  auto out = std::make_unique<OutboundRpc>(
      peer, FrameKind::kRequest, id, std::move(message), options_.exchange.eagerLimit,
      static_cast<SendFailureListener&>(*this));
  out->header().secondAttempt = sendsAgain ? 1 : 0;
  // What cannot leave yet is encoded when it can: until then it holds no second copy of its data.
  if (exchange_.wouldSendAtOnce(peer, out->header().chargedBytes)) {
    out->encode(exchange_.frames());
    out->dropSource();
  }
  submit(std::move(out), /*expectsReply=*/true);
}

void MpiAgent::onSendFailed(FrameKind kind, int peer, uint64_t callId, const std::string& reason) noexcept {
  if (kind == FrameKind::kRequest) {
    if (auto call = calls_.take(callId, peer)) {
      if (!failLater(*call, reason)) {
        completion_.fail(*call, reason);
      }
    }
  } else {
    LOG(WARNING) << "RPC response to " << members_.describe(peer) << " was not sent: " << reason;
  }
}

// See Note [Completion]. Any thread, also with the token. False if the table is closed.
bool MpiAgent::failLater(PendingCall call, const std::string& reason) {
  const auto now = Clock::now();
  call.timeout = now - call.made < kFailureDelay ? kFailureDelay : std::chrono::milliseconds(1);
  call.failure = reason;
  if (calls_.add(std::move(call), now) == 0) {
    return false;
  }
  engine_->wake();
  return true;
}

void MpiAgent::expire(Clock::time_point now) {
  for (PendingCall& call : calls_.takeExpired(now)) {
    if (call.failure.empty()) {
      call.failure = rpc::makeRPCError(timeoutText(call.timeout), rpc::RPCErrorType::TIMEOUT);
    }
    arrivals_.push_back(std::make_unique<ErrorTask>(*this, std::move(call)));
  }
}

} // namespace torch_rpc_mpi
