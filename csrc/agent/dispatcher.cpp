#include "agent/dispatcher.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include "base/error_text.h"
#include "base/flight_recorder.h"
#include "codec/receive_target.h"
#include "peer/outbound_control.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

namespace {

// Receive memory that was not used for so long goes back to the system.
constexpr auto kTrimAfter = std::chrono::seconds(5);
// What a device still uses is looked at after so long, where nothing else is to be done. Nobody waits for it but peers
// that have lent memory.
constexpr auto kDeviceLook = std::chrono::microseconds(50);

template <typename Body>
class FunctionTask final : public Task {
 public:
  explicit FunctionTask(Body body) : body_(std::move(body)) {}
  Kind kind() const override {
    return Kind::kCompletion;
  }
  void run() noexcept override {
    body_();
  }

 private:
  Body body_;
};

template <typename Body>
TaskPtr taskOf(Body body) {
  return std::make_unique<FunctionTask<Body>>(std::move(body));
}

// Lets go of messages that were sent, or tells those that were not: their tensors may belong to Python objects.
TaskPtr releaseOf(DoneMessages done) {
  return taskOf([done = std::move(done)] {
    for (const auto& [message, reason] : done.failed) {
      message->failed(reason);
    }
  });
}

// In a task, because to free memory of a device, or for it, waits for the device.
TaskPtr trimOf(std::shared_ptr<Devices> devices) {
  return taskOf([devices = std::move(devices)] {
    try {
      devices->trim();
    } catch (const std::exception& error) {
      LOG(WARNING) << "RPC could not give back memory of its devices: " << errorText(error);
    }
  });
}

} // namespace

Dispatcher::Dispatcher(
    Transport& transport,
    Membership& members,
    Exchange& exchange,
    Outbox& outbox,
    Server& server,
    Caller& caller,
    Join& join,
    FlightLog& flightLog,
    const AgentOptions::OnWorkerLost& onWorkerLost,
    std::chrono::milliseconds watchInterval,
    std::shared_ptr<Devices> devices)
    : transport_(transport),
      members_(members),
      exchange_(exchange),
      outbox_(outbox),
      server_(server),
      caller_(caller),
      join_(join),
      flightLog_(flightLog),
      onWorkerLost_(onWorkerLost),
      devices_(std::move(devices)),
      losses_(transport, members, exchange, server, join, watchInterval),
      lending_(members, exchange, devices_) {}

bool Dispatcher::hasQueued() const {
  return outbox_.filled() || exchange_.hasDue() || server_.owes();
}

Clock::time_point Dispatcher::nextDeadline() const {
  const auto deadline = caller_.nextDeadline();
  if (devices_ != nullptr && (devices_->holds() || lending_.pending())) {
    return std::min(deadline, Clock::now() + kDeviceLook);
  }
  return deadline;
}

bool Dispatcher::awaitsAnswers() const {
  return caller_.unanswered() > 0;
}

bool Dispatcher::rests() const {
  return rests_.load();
}

bool Dispatcher::awaitsDevice() const {
  // Also what has been posted since the last turn.
  return awaitsDevice_.load() || exchange_.counters().waitingForDevice.load(std::memory_order_relaxed) != 0;
}

bool Dispatcher::turn(ProgressToken& token, std::vector<TaskPtr>& tasks) {
  const auto handOver = [&] {
    if (tasks.empty()) {
      tasks.swap(arrivals_); // which needs no memory
      return;
    }
    tasks.reserve(tasks.size() + arrivals_.size()); // halfway, it would leave tasks of nothing
    std::move(arrivals_.begin(), arrivals_.end(), std::back_inserter(tasks));
    arrivals_.clear();
  };
  try {
    const bool active = progress(token);
    handOver();
    return active;
  } catch (...) {
    handOver(); // the calls that they complete are in no table any more, and there will be no other turn
    throw;
  }
}

bool Dispatcher::progress(ProgressToken& token) {
  const bool posted = outbox_.post(token, now_);
  if (server_.owes()) {
    server_.pay(token);
  }
  bool moved = exchange_.poll(token);
  if (devices_ != nullptr) {
    moved = devices_->poll() || moved;
    moved = lending_.send(token) || moved;
    awaitsDevice_ = exchange_.awaitsDevice(token);
  }
  const auto now = now_ = Clock::now();
  exchange_.look(token, now);
  losses_.takeFindings(token);
  if (now >= nextTrim_) {
    nextTrim_ = now + kTrimAfter;
    ReceivePool::instance().trim(now - kTrimAfter);
    if (devices_ != nullptr && devices_->keepsMemory()) {
      arrivals_.push_back(trimOf(devices_));
    }
  }
  caller_.expire(token, now, arrivals_);
  join_.advance(
      token, [&] { return idle(token); },
      [this] { return DrainCounts{exchange_.counters().framesSent, exchange_.counters().framesReceived}; });
  if (!moved && losses_.isTimeToLook(now)) {
    server_.payAgain();
    losses_.look(token, now);
  }
  losses_.addLastMessages(now, arrivals_);
  // While it serves, a peer may wait for credit that only a later turn reports.
  rests_ = transport_.allRing() && idle(token);
  DoneMessages done = exchange_.takeDone(token);
  if (!done.sent.empty() || !done.failed.empty()) {
    arrivals_.push_back(releaseOf(std::move(done)));
  }
  if (flightLog_.due()) {
    arrivals_.push_back(taskOf([this] { flightLog_.write(); }));
  }
  return moved || posted;
}

bool Dispatcher::idle(ProgressToken& token) const {
  return caller_.unanswered() == 0 && caller_.completing() == 0 && server_.serving() == 0 && !hasQueued() &&
      exchange_.quiet(token) && (devices_ == nullptr || (!devices_->holds() && !lending_.pending()));
}

std::unique_ptr<BulkTarget> Dispatcher::makeTarget(int source, const FrameHeader&, ConstSpan body) {
  return makeReceiveTarget(body, devices_, source);
}

// So that device memory that is lent with a message goes back even if nobody reads the message.
void Dispatcher::keepLoans(InboundMessage& message) const {
  if (message.header.tickets != 0 && message.target == nullptr && message.error.empty()) {
    message.target = makeReceiveTarget(message.body(), devices_, message.source);
    require(message.target->parts.empty(), "its body announces parts that its frame does not");
  }
}

void Dispatcher::onMessage(ProgressToken& token, InboundMessage&& message) {
  const int source = message.source;
  keepLoans(message); // what it throws fails the peer
  switch (message.header.kind) {
    case FrameKind::kRequest:
      if (TaskPtr task = server_.arrived(std::move(message))) {
        arrivals_.push_back(std::move(task));
      }
      break;
    case FrameKind::kResponse:
      if (!caller_.onResponse(std::move(message), arrivals_)) {
        exchange_.fail(token, source, "it answered a call that was made to another worker");
      }
      break;
    case FrameKind::kGoodbye:
      losses_.onGoodbye(token, source, message.body());
      break;
    case FrameKind::kDrain: {
      const std::string wrong = join_.onFrame(token, source, message.body());
      if (!wrong.empty()) {
        failForNonsense(token, source, wrong);
      }
      break;
    }
    case FrameKind::kInquiry:
      answerInquiry(token, source, message.body());
      break;
    case FrameKind::kStatement:
      try {
        caller_.onStatement(source, readStatement(message.body()));
      } catch (const std::runtime_error& error) {
        failForNonsense(token, source, error.what());
      }
      break;
    case FrameKind::kForget:
      server_.forget(source, message.header.callId, exchange_.receives(token, source));
      break;
    case FrameKind::kLost:
      try {
        losses_.onNews(token, source, message.body());
      } catch (const std::runtime_error& error) {
        failForNonsense(token, source, error.what());
      }
      break;
    case FrameKind::kOffer:
    case FrameKind::kVerdict:
    case FrameKind::kReturn:
      lending_.onFrame(token, message);
      break;
    case FrameKind::kBatch: // the exchange takes it apart
    case FrameKind::kCredit:
      break;
  }
}

void Dispatcher::answerInquiry(ProgressToken& token, int source, ConstSpan body) {
  try {
    const Statement statement = server_.stateOf(token, source, readInquiry(body));
    exchange_.post(token, std::make_unique<OutboundControl>(source, FrameKind::kStatement, writeStatement(statement)));
  } catch (const std::bad_alloc&) { // the caller does without
  } catch (const std::runtime_error& error) {
    failForNonsense(token, source, error.what());
  }
}

void Dispatcher::failForNonsense(ProgressToken& token, int source, const std::string& what) {
  exchange_.fail(token, source, "it sent a frame that makes no sense: " + what);
}

void Dispatcher::onStrayFrame(int source, const std::string& reason) {
  LOG(ERROR) << "RPC on " << members_.describe(members_.rank()) << " dropped a frame from rank " << source << ": "
             << reason;
}

std::string Dispatcher::failureText(int peer, const std::string& cause) const {
  return c10::str("RPC to ", members_.describe(peer), " failed: ", cause, ". Calls to it can no longer be answered");
}

void Dispatcher::onPeerEnded(ProgressToken&, int peer, const std::string& reason) {
  const std::string& cause = losses_.onPeerEnded(peer, reason);
  FlightRecorder::instance().record(CallEvent::kPeerLost, peer, 0);
  flightLog_.note("lost ", peer);
  if (devices_ != nullptr && devices_->lender() != nullptr) {
    devices_->lender()->lose(peer);
  }
  caller_.onPeerEnded(peer, reason);
  join_.fail(cause);
  try {
    arrivals_.push_back(taskOf([this, peer, reason] { onWorkerLost_(peer, reason); }));
  } catch (const std::bad_alloc&) { // the program is not told, but its calls have failed
  }
}

void Dispatcher::onBroken(const std::string& reason, std::vector<TaskPtr>& tasks) noexcept {
  try {
    const int self = members_.rank();
    const std::string text = c10::str("RPC on ", members_.describe(self), " stopped: ", reason);
    LOG(ERROR) << text;
    flightLog_.note("the transport is broken on ", self);
    members_.lose(self, text, text); // whatever is asked for later: the first reason is the one that helps
    join_.fail(text);
    caller_.close(text, tasks);
  } catch (const std::bad_alloc&) { // which may well be the reason; what is left fails when this worker leaves
  }
}

} // namespace torch_rpc_mpi
