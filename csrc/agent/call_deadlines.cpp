#include "agent/call_deadlines.h"

#include <algorithm>
#include <new>
#include <utility>

#include "agent/completion_task.h"
#include "base/flight_recorder.h"
#include "host/freed_memory.h"
#include "peer/outbound_control.h"

namespace torch_rpc_mpi {

namespace {

// So that a turn in which very many run out does not keep what has arrived waiting.
constexpr size_t kExpiredInTurn = 256;
static_assert(kExpiredInTurn <= kLateCallsAsked, "all that are late in a turn fit one inquiry");

constexpr uint64_t kLarge = uint64_t{1} << 20; // bytes

} // namespace

// Of a call that failed here, or whose time is over.
class CallDeadlines::ExpiryTask final : public CompletionTask {
 public:
  ExpiryTask(Completion& completion, FlightLog& flightLog) : CompletionTask(completion), flightLog_(flightLog) {}
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
      flightLog_.note("a call timed out, to ", call.peer);
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

  FlightLog& flightLog_;
  OutboundPtr unsent_;
};

CallDeadlines::CallDeadlines(
    const Membership& members,
    CallTable& calls,
    Completion& completion,
    Exchange& exchange,
    Server& server,
    FlightLog& flightLog)
    : members_(members),
      calls_(calls),
      completion_(completion),
      exchange_(exchange),
      server_(server),
      flightLog_(flightLog) {
  late_.reserve(kExpiredInTurn);
}

void CallDeadlines::expire(ProgressToken& token, Clock::time_point now, std::vector<TaskPtr>& tasks) {
  std::unique_ptr<ExpiryTask> task;
  for (size_t looked = 0; looked < kExpiredInTurn && now >= calls_.nextDeadline(); ++looked) {
    makeRoom(tasks);
    if (task == nullptr) {
      task = std::make_unique<ExpiryTask>(completion_, flightLog_);
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

void CallDeadlines::askAfterLate(ProgressToken& token) {
  std::ranges::sort(late_, {}, &Late::peer); // which needs no memory
  try {
    for (auto first = late_.begin(); first != late_.end();) {
      const int peer = first->peer;
      std::vector<uint64_t> ids;
      for (; first != late_.end() && first->peer == peer; ++first) {
        const bool own = peer == members_.rank();
        if (!own && exchange_.holdsRequest(token, peer, first->id)) {
          calls_.explain(first->id, peer, sharedText(notSent(members_.describe(peer))));
        } else if (!own && exchange_.stagesRequest(token, peer, first->id)) {
          calls_.explain(first->id, peer, sharedText(notReady()));
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

void CallDeadlines::onStatement(int source, const Statement& statement) {
  const std::string callee = members_.describe(source);
  for (const LateCall& call : statement.calls) {
    calls_.explain(call.id, source, sharedText(whyLate(callee, statement.business, call)));
  }
}

// Neither its caller's memory nor its callee's time is to be spent on it.
OutboundPtr CallDeadlines::forget(ProgressToken& token, const PendingCall& call) noexcept {
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

void CallDeadlines::failAll(const std::string& reason, std::vector<TaskPtr>& tasks) {
  for (;;) {
    makeRoom(tasks);
    auto task = std::make_unique<ExpiryTask>(completion_, flightLog_);
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

} // namespace torch_rpc_mpi
