#include "agent/caller.h"

#include <utility>

#include "agent/completion_task.h"
#include "agent/engine_work.h"
#include "agent/future_wait.h"
#include "base/error_text.h"
#include "base/flight_recorder.h"
#include "codec/inbound_rpc.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// The call that this thread made last and will drive.
thread_local JitFuturePtr awaited;
// Whether call() is to wait for it; see AnswerInSend.
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

} // namespace

// Of a response that has arrived: of a call, or of one that has been given up.
class Caller::ResponseTask final : public CompletionTask {
 public:
  ResponseTask(Caller& caller, InboundMessage&& inbound)
      : CompletionTask(caller.completion_),
        caller_(caller),
        inbound_(std::move(inbound)) {}
  void run() noexcept override {
    const PendingCall call = take();
    if (call.future == nullptr) {
      runLate();
      return;
    }
    MessageInStreams response;
    try {
      response = decodeMessage(std::move(inbound_), caller_.devices_);
    } catch (const BadMessage& error) {
      caller_.outbox_.refuse(call.peer, error.what());
      completion().fail(call, [&] { return unread(error); });
      return;
    } catch (const std::exception& error) {
      completion().fail(call, [&] { return unread(error); });
      return;
    }
    FlightRecorder::instance().record(CallEvent::kCompleted, call.peer, call.id, call.type);
    completion().complete(call, response.message, response.streams);
  }

 private:
  void runLate() noexcept {
    const int source = inbound_.source;
    try {
      caller_.onLateResponse_(*decodeMessage(std::move(inbound_), caller_.devices_).message);
    } catch (const BadMessage& error) {
      caller_.outbox_.refuse(source, error.what());
    } catch (const std::exception&) { // nobody would be told
    }
  }
  static std::string unread(const std::exception& error) {
    return "The response could not be read: " + errorText(error);
  }

  Caller& caller_;
  InboundMessage inbound_;
};

Caller::Caller(
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
    AgentOptions::OnLateResponse onLateResponse)
    : members_(members),
      completion_(completion),
      exchange_(exchange),
      outbox_(outbox),
      server_(server),
      engine_(engine),
      signals_(signals),
      devices_(std::move(devices)),
      onLateResponse_(std::move(onLateResponse)),
      calls_(slotUsesBefore),
      ownCalls_(members.rank(), calls_, completion, server, engine, devices_, onLateResponse_),
      deadlines_(members, calls_, completion, exchange, server, flightLog) {}

PendingCall Caller::newCall(int peer, rpc::MessageType type, std::chrono::milliseconds timeout) const {
  PendingCall call;
  call.future = devices_ == nullptr ? c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get())
                                    : c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get(), devices_->all());
  call.peer = peer;
  call.type = type;
  call.timeout = timeout;
  call.made = Clock::now();
  return call;
}

JitFuturePtr Caller::failingCall(int peer, rpc::MessageType type, const std::string& failure) {
  const GuestAnnouncement announcement;
  PendingCall call = newCall(peer, type, kFailureDelay);
  call.failure = sharedText(failure);
  JitFuturePtr future = call.future;
  const auto made = call.made;
  const bool open = calls_.add(std::move(call), made) != 0;
  engine_->wake();
  return open ? future : nullptr;
}

JitFuturePtr Caller::call(
    int peer,
    RpcMessage message,
    std::chrono::milliseconds timeout,
    std::shared_ptr<OutboundSlices> onDevices,
    const Later& later) {
  const GuestAnnouncement announcement;
  if (const auto reason = members_.whyLost(peer)) {
    return failingCall(peer, message->type(), *reason);
  }
  const bool toSelf = peer == members_.rank();
  PendingCall call = newCall(peer, message->type(), timeout);
  call.delayed = static_cast<bool>(later);
  JitFuturePtr future = call.future;
  const auto made = call.made;
  if (Engine::guestAnnounced()) {
    // A call to oneself another thread runs, and is there as soon as this one would be.
    Engine::announceGuest(!toSelf);
    awaited = toSelf ? nullptr : future;
  }
  const uint64_t id = calls_.add(std::move(call), made);
  if (id == 0) {
    return nullptr;
  }
  message->setId(static_cast<int64_t>(id));
  FlightRecorder::instance().record(CallEvent::kMade, peer, id, message->type());
  if (later) {
    later([this, peer, id, message, onDevices] {
      try {
        dispatch(peer, id, message, onDevices, Clock::time_point::max());
      } catch (const std::exception& error) {
        onSendFailed(FrameKind::kRequest, peer, id, errorText(error));
      }
    });
    return future;
  }
  try {
    const auto deadline = timeout.count() > 0 ? made + timeout : Clock::time_point::max();
    dispatch(peer, id, std::move(message), std::move(onDevices), deadline);
  } catch (...) {
    calls_.take(id, peer);
    throw;
  }
  Engine::announceGuest(false); // before it drives: what its callbacks send is announced anew
  if (std::exchange(answersInSend, false)) {
    driveUntil(*future);
    serveUntilCompleted(signals_, *future);
  }
  return future;
}

void Caller::dispatch(
    int peer,
    uint64_t id,
    RpcMessage message,
    std::shared_ptr<OutboundSlices> onDevices,
    Clock::time_point deadline) {
  const EngineWork work;
  if (peer == members_.rank()) {
    ownCalls_.post(id, *message, onDevices.get(), deadline);
  } else {
    sendToPeer(peer, id, std::move(message), std::move(onDevices), deadline);
  }
}

void Caller::sendToPeer(
    int peer,
    uint64_t id,
    RpcMessage message,
    std::shared_ptr<OutboundSlices> onDevices,
    Clock::time_point deadline) {
  server_.heldByPeers().sends(peer);
  const bool copiesNow = onDevices != nullptr && onDevices->inCurrent();
  auto out = outbox_.make(peer, FrameKind::kRequest, id, std::move(message), *this, std::move(onDevices));
  out->header().secondAttempt = sendsAgain ? 1 : 0;
  out->setDeadline(deadline);
  // What cannot leave yet is encoded when it can: until then it holds no second copy of its data.
  if (copiesNow || exchange_.wouldSendAtOnce(peer, out->header().chargedBytes)) {
    outbox_.encode(*out);
  }
  outbox_.submit(std::move(out), /*expectsReply=*/true);
}

void Caller::onSendFailed(FrameKind, int peer, uint64_t callId, const std::string& reason) noexcept {
  if (calls_.failLater(callId, peer, sharedText(reason), Clock::now())) {
    engine_->wake();
  }
}

// The thread drives only where its answer is the next to come. A guest hands other completions to a thread that must be
// woken for them, such as the owner's answer to the remote() before a to_here(): 15 us more than without a guest.
Caller::AnswerInSend::AnswerInSend(Caller& caller) : caller_(caller) {
  caller_.expectAnswer(caller_.unanswered() == 0);
  answersInSend = true;
}

Caller::AnswerInSend::~AnswerInSend() {
  caller_.expectAnswer(false);
  answersInSend = false;
}

Caller::SecondAttempt::SecondAttempt() {
  sendsAgain = true;
}

Caller::SecondAttempt::~SecondAttempt() {
  sendsAgain = false;
}

void Caller::expectAnswer(bool expected) {
  if (engine_->onEngineThread()) {
    return; // so call() leaves `awaited` empty, and driveUntil() has nothing to drive for
  }
  awaited.reset();
  Engine::announceGuest(expected);
}

void Caller::driveUntil(const c10::ivalue::Future& future) {
  if (const JitFuturePtr call = std::exchange(awaited, nullptr)) {
    const EngineWork work;
    engine_->driveFor(call.get(), [&] { return future.completed(); });
  }
}

bool Caller::onResponse(InboundMessage&& response, std::vector<TaskPtr>& tasks) {
  const int peer = response.source;
  const uint64_t id = response.header.callId;
  FlightRecorder::instance().record(
      CallEvent::kAnswered, peer, id, response.header.messageType, response.header.bodyBytes);
  makeRoom(tasks);
  auto task = std::make_unique<ResponseTask>(*this, std::move(response));
  if (auto call = calls_.take(id, peer)) {
    task->give(std::move(*call));
    tasks.push_back(std::move(task));
    return true;
  }
  if (calls_.awaitsOther(id, peer)) {
    return false;
  }
  task->count(); // it came too late, but RRefs that it may hold are to be let go of
  tasks.push_back(std::move(task));
  return true;
}

void Caller::onPeerEnded(int peer, const std::string& reason) {
  calls_.failAllOf(peer, sharedText(reason), Clock::now());
  engine_->wake();
}

void Caller::close() {
  calls_.close();
  while (auto call = calls_.takeAny()) {
    completion_.fail(*call, [&] { return completion_.shutDownText(); });
  }
}

void Caller::close(const std::string& reason, std::vector<TaskPtr>& tasks) {
  calls_.close();
  deadlines_.failAll(reason, tasks);
}

} // namespace torch_rpc_mpi
