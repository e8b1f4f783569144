#include "agent/dispatcher.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include "agent/farewell.h"
#include "agent/loss_news.h"
#include "base/error_text.h"
#include "base/flight_recorder.h"
#include "host/other_process.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

namespace {

// Receive memory that was not used for so long goes back to the system.
constexpr auto kTrimAfter = std::chrono::seconds(5);
// What a process had sent before it ended, a goodbye perhaps, has so long to arrive.
constexpr auto kLastWords = std::chrono::milliseconds(100);
// What a device still uses is looked at after so long, where nothing else is to be done. Nobody waits for it but peers
// that have lent memory.
constexpr auto kDeviceLook = std::chrono::microseconds(50);
// So long what a lost peer held is kept: see Note [What the lost held].
constexpr auto kLastRequests = std::chrono::seconds(1);
// Where this rank waits for the verdict on a graceful shutdown, a process that ends has probably had it, and it is the
// verdict that is late: the rank that passes it on may be without a core. One that has crashed instead is told of by
// those that still waited for its report.
constexpr auto kLateVerdict = std::chrono::milliseconds(500);

// Lets go of messages that were sent, or tells those that were not: their tensors may belong to Python objects.
class ReleaseTask final : public Task {
 public:
  explicit ReleaseTask(DoneMessages done) : done_(std::move(done)) {}
  Kind kind() const override {
    return Kind::kCompletion;
  }
  void run() noexcept override {
    for (auto& [message, reason] : done_.failed) {
      message->failed(reason);
    }
  }

 private:
  DoneMessages done_;
};

class LossTask final : public Task {
 public:
  LossTask(const AgentOptions::OnWorkerLost& listener, int peer, std::string reason)
      : listener_(listener),
        peer_(peer),
        reason_(std::move(reason)) {}
  Kind kind() const override {
    return Kind::kCompletion;
  }
  void run() noexcept override {
    listener_(peer_, reason_);
  }

 private:
  const AgentOptions::OnWorkerLost& listener_;
  const int peer_;
  const std::string reason_;
};

// In a task, because to free memory of a device, or for it, waits for the device.
class TrimTask final : public Task {
 public:
  explicit TrimTask(std::shared_ptr<Devices> devices) : devices_(std::move(devices)) {}
  Kind kind() const override {
    return Kind::kCompletion;
  }
  void run() noexcept override {
    try {
      devices_->trim();
    } catch (const std::exception& error) {
      LOG(WARNING) << "RPC could not give back memory of its devices: " << errorText(error);
    }
  }

 private:
  const std::shared_ptr<Devices> devices_;
};

class FlightLogTask final : public Task {
 public:
  explicit FlightLogTask(FlightLog& log) : log_(log) {}
  Kind kind() const override {
    return Kind::kCompletion;
  }
  void run() noexcept override {
    log_.write();
  }

 private:
  FlightLog& log_;
};

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
      watchInterval_(watchInterval),
      devices_(std::move(devices)),
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
  const bool posted = outbox_.post(token);
  if (server_.owes()) {
    server_.pay(token);
  }
  bool moved = exchange_.poll(token);
  if (devices_ != nullptr) {
    moved = devices_->poll() || moved;
    moved = lending_.send(token) || moved;
    awaitsDevice_ = exchange_.awaitsDevice(token);
  }
  const auto now = Clock::now();
  exchange_.look(token, now);
  if (watch_ != nullptr) {
    takeFindings(token);
  }
  if (now >= nextTrim_) {
    nextTrim_ = now + kTrimAfter;
    ReceivePool::instance().trim(now - kTrimAfter);
    if (devices_ != nullptr && devices_->keepsMemory()) {
      arrivals_.push_back(std::make_unique<TrimTask>(devices_));
    }
  }
  caller_.expire(token, now, arrivals_);
  join_.advance(
      token, [&] { return idle(token); },
      [this] { return DrainCounts{exchange_.counters().framesSent, exchange_.counters().framesReceived}; });
  if (!moved && now >= nextWatch_) {
    watchNeighbours(token, now);
  }
  std::erase_if(lost_, [&](const Ended& lost) {
    if (now - lost.found < kLastRequests) {
      return false;
    }
    arrivals_.push_back(server_.lastMessagesOf(lost.peer));
    return true;
  });
  // While it serves, a peer may wait for credit that only a later turn reports.
  rests_ = transport_.allRing() && idle(token);
  DoneMessages done = exchange_.takeDone(token);
  if (!done.sent.empty() || !done.failed.empty()) {
    arrivals_.push_back(std::make_unique<ReleaseTask>(std::move(done)));
  }
  if (flightLog_.due()) {
    arrivals_.push_back(std::make_unique<FlightLogTask>(flightLog_));
  }
  return moved || posted;
}

bool Dispatcher::idle(ProgressToken& token) const {
  return caller_.unanswered() == 0 && caller_.completing() == 0 && server_.serving() == 0 && !hasQueued() &&
      exchange_.quiet(token) && (devices_ == nullptr || (!devices_->holds() && !lending_.pending()));
}

// Everything that has arrived was read: nothing moved in this turn.
void Dispatcher::watchNeighbours(ProgressToken& token, Clock::time_point now) {
  nextWatch_ = now + watchInterval_;
  server_.payAgain();
  for (const int peer : transport_.takeEnded(token)) {
    ended_.push_back({peer, now});
  }
  const auto patience = join_.awaitsVerdict() ? kLateVerdict : kLastWords;
  std::erase_if(ended_, [&](const Ended& ended) {
    if (now - ended.found < patience) {
      return false;
    }
    if (watch_ != nullptr && exchange_.stateOf(ended.peer) == Peer::State::kOpen &&
        watch_->speaksFor(ended.peer, [&](int peer) { return exchange_.stateOf(peer) == Peer::State::kOpen; })) {
      tellOthers(token, {ended.peer, Watch::Kind::kEnded, kEndedWithoutLeaving});
    }
    exchange_.fail(token, ended.peer, kEndedWithoutLeaving);
    return true;
  });
}

// At once: one that leaves has said so where its end was seen. And the less MPI touches one that has ended, the better.
void Dispatcher::takeFindings(ProgressToken& token) {
  for (const Watch::Finding& finding : watch_->takeFindings()) {
    if (finding.kind == Watch::Kind::kUnreachable) {
      LOG(WARNING) << "RPC on " << members_.describe(members_.rank()) << " cannot watch "
                   << members_.describe(finding.rank) << ": " << finding.text
                   << ". If that one dies or its host is gone, calls to it wait for their timeouts";
    } else if (exchange_.stateOf(finding.rank) == Peer::State::kOpen) {
      tellOthers(token, finding);
      exchange_.fail(token, finding.rank, finding.text);
    }
  }
}

// One that is silent is told too, should it go on: nobody will talk to it any more. One that has ended must not be
// touched, which MPI may not survive.
void Dispatcher::tellOthers(ProgressToken& token, const Watch::Finding& lost) try {
  const std::string body = writeLossNews({lost.rank, lost.text});
  for (int peer = 0; peer < transport_.size(); ++peer) {
    const bool touched = peer != members_.rank() && (peer != lost.rank || lost.kind == Watch::Kind::kSilent);
    if (touched && exchange_.stateOf(peer) == Peer::State::kOpen) {
      exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kLost, body));
    }
  }
} catch (const std::bad_alloc&) { // they find out, or not; that this rank does comes first
}

void Dispatcher::onNews(ProgressToken& token, int source, ConstSpan body) {
  try {
    const LossNews news = readLossNews(body, transport_.size());
    if (news.rank != members_.rank()) {
      exchange_.fail(token, news.rank, news.text + ", as " + members_.describe(source) + " has found");
      return;
    }
    const std::string cause =
        "this worker was given up by " + members_.describe(source) + " and so by all: " + news.text;
    for (int peer = 0; peer < transport_.size(); ++peer) {
      if (peer != members_.rank()) {
        exchange_.fail(token, peer, cause);
      }
    }
  } catch (const std::runtime_error& error) {
    failForNonsense(token, source, error.what());
  }
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

void Dispatcher::onMessage(ProgressToken& token, InboundMessage message) {
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
    case FrameKind::kGoodbye: {
      const Farewell said = readFarewell(message.body());
      std::string farewell = said.text;
      if (!said.cause.empty()) {
        farewell += ", after it had lost another worker: " + said.cause;
        causes_.emplace(source, said.cause);
      }
      exchange_.leaves(token, source, "it has left (" + farewell + ")", Clock::now());
      break;
    }
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
      onNews(token, source, message.body());
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
  const auto found = causes_.find(peer);
  const std::string& cause = found == causes_.end() ? reason : found->second;
  members_.lose(peer, reason, cause);
  if (watch_ != nullptr) {
    watch_->forget(peer);
  }
  FlightRecorder::instance().record(CallEvent::kPeerLost, peer, 0);
  flightLog_.note("lost ", peer);
  if (devices_ != nullptr && devices_->lender() != nullptr) {
    devices_->lender()->lose(peer);
  }
  caller_.onPeerEnded(peer, reason);
  lost_.push_back({peer, Clock::now()});
  join_.fail(cause);
  try {
    arrivals_.push_back(std::make_unique<LossTask>(onWorkerLost_, peer, reason));
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
