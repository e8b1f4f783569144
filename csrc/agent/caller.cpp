#include "agent/caller.h"

#include <algorithm>
#include <new>
#include <thread>
#include <utility>

#include "agent/engine_work.h"
#include "agent/future_wait.h"
#include "base/error_text.h"
#include "base/flight_recorder.h"
#include "host/freed_memory.h"

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

// So that a turn in which very many run out does not keep what has arrived waiting.
constexpr size_t kExpiredInTurn = 256;
static_assert(kExpiredInTurn <= kLateCallsAsked, "all that are late in a turn fit one inquiry");

constexpr uint64_t kLarge = uint64_t{1} << 20; // bytes

// For want of memory for more. Made when the library is loaded.
const auto* const kLost = new std::shared_ptr<const std::string>(
    std::make_shared<const std::string>("The worker that was called can no longer answer"));

std::shared_ptr<const std::string> sharedText(const std::string& text) noexcept {
  try {
    return std::make_shared<const std::string>(text);
  } catch (const std::bad_alloc&) {
    return *kLost;
  }
}

// So that the next push_back() does not throw.
void makeRoom(std::vector<TaskPtr>& tasks) {
  if (tasks.size() == tasks.capacity()) {
    tasks.reserve(std::max<size_t>(2 * tasks.size(), 8));
  }
}

} // namespace

// Completes the future of a call, whatever becomes of the task: if the engine stops before it has run, with an error.
class Caller::CompletionTask : public Task {
 public:
  explicit CompletionTask(Caller& caller) : caller_(caller) {}
  ~CompletionTask() override {
    if (call_.future != nullptr) {
      caller_.completion_.fail(call_, [this] { return caller_.shutDownText(); });
    }
    if (counted_) {
      caller_.completing_.fetch_sub(1);
    }
  }
  Kind kind() const override {
    return Kind::kCompletion;
  }
  bool completes(const void* awaited) const override {
    return call_.future.get() == awaited;
  }
  void give(PendingCall call) noexcept {
    caller_.completing_.fetch_add(1);
    counted_ = true;
    call_ = std::move(call);
  }

 protected:
  Caller& caller() const {
    return caller_;
  }
  const Completion& completion() const {
    return caller_.completion_;
  }
  PendingCall take() {
    return std::exchange(call_, PendingCall());
  }

 private:
  Caller& caller_;
  PendingCall call_;
  bool counted_ = false;
};

// Of a call whose response arrived.
class Caller::ResponseTask final : public CompletionTask {
 public:
  ResponseTask(Caller& caller, InboundMessage inbound) : CompletionTask(caller), inbound_(std::move(inbound)) {}
  void run() noexcept override {
    const PendingCall call = take();
    MessageInStreams response;
    try {
      response = decodeMessage(std::move(inbound_), caller().devices_);
    } catch (const BadMessage& error) {
      caller().outbox_.refuse(call.peer, error.what());
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
  static std::string unread(const std::exception& error) {
    return "The response could not be read: " + errorText(error);
  }

  InboundMessage inbound_;
};

// One that runs when what comes from a device is in pinned memory, and takes it from there.
class Caller::CopiedTask final : public Task {
 public:
  CopiedTask(std::function<void()> finish, TaskPtr task) : finish_(std::move(finish)), task_(std::move(task)) {}
  Kind kind() const override {
    return task_->kind();
  }
  bool completes(const void* awaited) const override {
    return task_->completes(awaited);
  }
  void run() noexcept override {
    finish_();
    task_->run();
  }

 private:
  const std::function<void()> finish_;
  const TaskPtr task_;
};

// Of a call to this worker itself, whose response comes from a device to the host.
class Caller::OwnResponseTask final : public CompletionTask {
 public:
  OwnResponseTask(Caller& caller, RpcMessage response, Streams streams)
      : CompletionTask(caller),
        response_(std::move(response)),
        streams_(std::move(streams)) {}
  void run() noexcept override {
    completion().complete(take(), response_, streams_);
  }

 private:
  const RpcMessage response_;
  const Streams streams_;
};

// Of a call that failed here, or whose time is over.
class Caller::ExpiryTask final : public CompletionTask {
 public:
  using CompletionTask::CompletionTask;
  // Its request, which will not be sent any more.
  void give(PendingCall call, OutboundPtr unsent) noexcept {
    CompletionTask::give(std::move(call));
    unsent_ = std::move(unsent);
  }
  void run() noexcept override {
    letGo(); // before anybody learns that the call is over
    const PendingCall call = take();
    const bool timedOut = call.failure == nullptr;
    FlightRecorder::instance().record(
        timedOut ? CallEvent::kTimedOut : CallEvent::kFailed, call.peer, call.id, call.type);
    if (timedOut) {
      caller().flightLog_.note("a call timed out, to ", call.peer);
    }
    completion().expire(call);
  }

 private:
  // Of the caller's tensors. Calls with large ones time out for want of credit, many at once perhaps.
  void letGo() noexcept {
    const bool large = unsent_ != nullptr && unsent_->header().chargedBytes > kLarge;
    unsent_.reset();
    if (large) {
      giveBackFreedMemory();
    }
  }

  OutboundPtr unsent_;
};

Caller::Caller(
    const Membership& members,
    const Completion& completion,
    Exchange& exchange,
    Outbox& outbox,
    Server& server,
    const std::shared_ptr<Engine>& engine,
    FlightLog& flightLog,
    SignalService signals,
    uint32_t slotUsesBefore,
    std::shared_ptr<Devices> devices)
    : members_(members),
      completion_(completion),
      exchange_(exchange),
      outbox_(outbox),
      server_(server),
      engine_(engine),
      flightLog_(flightLog),
      signals_(signals),
      devices_(std::move(devices)),
      calls_(slotUsesBefore) {
  late_.reserve(kExpiredInTurn);
}

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
    HeldByPeers::made({});
    if (onDevices != nullptr) {
      postOwn(id, *message, *onDevices, deadline);
    } else {
      Streams streams = devices_ == nullptr ? Streams() : devices_->poolStreams();
      engine_->post(server_.ownRequest(id, copyMessage(*message), std::move(streams), deadline));
    }
  } else {
    sendToPeer(peer, id, std::move(message), std::move(onDevices), deadline);
  }
}

void Caller::postOwn(
    uint64_t id,
    const rpc::Message& message,
    const OutboundSlices& onDevices,
    Clock::time_point deadline) {
  OwnCopy copy = copyMessage(message, onDevices);
  TaskPtr task = server_.ownRequest(id, copy.message, copy.streams, deadline);
  whenCopied(std::move(copy), std::move(task));
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

bool Caller::onResponse(InboundMessage response, std::vector<TaskPtr>& tasks) {
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
  return !calls_.awaitsOther(id, peer); // else it came too late
}

void Caller::onOwnResponse(uint64_t id, MakeResponse response) noexcept {
  auto call = calls_.take(id, members_.rank());
  if (!call) {
    return;
  }
  try {
    RpcMessage message = response();
    if (message->type() != rpc::MessageType::EXCEPTION) {
      message = copyMessage(*message);
    }
    completion_.complete(*call, message, devices_ == nullptr ? Streams() : devices_->poolStreams());
  } catch (const std::exception& error) {
    completion_.fail(*call, [&] { return "The response could not be sent: " + errorText(error); });
  }
}

void Caller::onOwnResponse(uint64_t id, RpcMessage response, const OutboundSlices& onDevices) {
  OwnCopy copy = copyMessage(*response, onDevices);
  auto task = std::make_unique<OwnResponseTask>(*this, copy.message, copy.streams);
  if (auto call = calls_.take(id, members_.rank())) {
    task->give(std::move(*call));
    whenCopied(std::move(copy), std::move(task));
  }
}

// The task is run when what comes from a device to the host is there.
void Caller::whenCopied(OwnCopy copy, TaskPtr task) {
  if (copy.awaited.empty()) {
    engine_->post(std::move(task));
    return;
  }
  auto finishing = std::make_shared<TaskPtr>(std::make_unique<CopiedTask>(std::move(copy.finish), std::move(task)));
  const auto later = std::make_shared<AtLast>(
      [finishing = std::move(finishing), engine = engine_] { engine->post(std::move(*finishing)); });
  for (DeviceEvent& event : copy.awaited) {
    devices_->holdUntil(std::move(event), later);
  }
  engine_->wake();
}

void Caller::expire(ProgressToken& token, Clock::time_point now, std::vector<TaskPtr>& tasks) {
  std::unique_ptr<ExpiryTask> task;
  for (size_t looked = 0; looked < kExpiredInTurn && now >= calls_.nextDeadline(); ++looked) {
    makeRoom(tasks);
    if (task == nullptr) {
      task = std::make_unique<ExpiryTask>(*this);
    }
    auto due = calls_.takeDue(now);
    if (!due) {
      break;
    }
    if (due->expired) {
      OutboundPtr unsent = forget(token, *due->expired);
      task->give(std::move(*due->expired), std::move(unsent));
      tasks.push_back(std::move(task));
    } else {
      late_.push_back({due->peer, due->id}); // for which there is room
    }
  }
  if (!late_.empty()) {
    askAfterLate(token);
  }
}

// See Note [Late calls].
void Caller::askAfterLate(ProgressToken& token) {
  std::ranges::sort(late_, {}, &Late::peer); // which needs no memory
  try {
    for (auto first = late_.begin(); first != late_.end();) {
      const int peer = first->peer;
      std::vector<uint64_t> ids;
      for (; first != late_.end() && first->peer == peer; ++first) {
        if (peer != members_.rank() && exchange_.holdsRequest(token, peer, first->id)) {
          calls_.explain(first->id, peer, sharedText(notSent(members_.describe(peer))));
        } else {
          ids.push_back(first->id);
        }
      }
      if (peer == members_.rank()) {
        onStatement(peer, server_.stateOf(token, peer, ids));
      } else if (!ids.empty()) {
        exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kInquiry, writeInquiry(ids)));
      }
    }
  } catch (const std::bad_alloc&) { // their timeouts do without
  }
  late_.clear();
}

void Caller::onStatement(int source, const Statement& statement) {
  const std::string callee = members_.describe(source);
  for (const LateCall& call : statement.calls) {
    calls_.explain(call.id, source, sharedText(whyLate(callee, statement.business, call)));
  }
}

// Neither its caller's memory nor its callee's time is to be spent on it.
OutboundPtr Caller::forget(ProgressToken& token, const PendingCall& call) noexcept {
  if (call.failure != nullptr || call.delayed) { // its peer has ended, or it was not sent; or nothing is to be spared
    return nullptr;
  }
  try {
    if (call.peer == members_.rank()) {
      server_.forget(call.peer, call.id, /*comes=*/false);
    } else {
      return exchange_.forget(token, call.peer, call.id);
    }
  } catch (const std::bad_alloc&) { // then it is sent, and run, for nobody
  }
  return nullptr;
}

void Caller::onPeerEnded(int peer, const std::string& reason) {
  calls_.failAllOf(peer, sharedText(reason), Clock::now());
  engine_->wake();
}

void Caller::close(const std::string& reason) {
  calls_.close();
  while (auto call = calls_.takeAny()) {
    completion_.fail(*call, [&] { return reason; });
  }
}

void Caller::close(const std::string& reason, std::vector<TaskPtr>& tasks) {
  calls_.close();
  for (;;) {
    makeRoom(tasks);
    auto task = std::make_unique<ExpiryTask>(*this);
    auto call = calls_.takeAny();
    if (!call) {
      return;
    }
    if (call->failure == nullptr) {
      call->failure = sharedText(reason);
    }
    task->give(std::move(*call), nullptr);
    tasks.push_back(std::move(task));
  }
}

std::string Caller::shutDownText() const {
  return c10::str("RPC was shut down on ", members_.describe(members_.rank()), " before this call was answered");
}

} // namespace torch_rpc_mpi
