// How the agent ends: by agreement (join, then shutdown) or on its own (shutdown without join, exit).
#include <string_view>

#include "agent/engine_work.h"
#include "agent/mpi_agent.h"
#include "agent/tasks.h"
#include "base/error_text.h"
#include "host/fork_guard.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

namespace {

// User code may run for ever. Leaving waits so long for what is running, then goes on without it.
constexpr auto kRunningTasksLimit = std::chrono::seconds(5);
// Goodbyes and the last drain frames are tiny; they are gone at once unless the peer is stuck.
constexpr auto kFlushLimit = std::chrono::milliseconds(500);
// In a goodbye; of which so many bytes at most, because that is to fit its frame.
constexpr std::string_view kCause = ", after it had lost another worker: ";
constexpr size_t kCauseLength = 400;

// Agents some of whose threads outlive them.
void keepForEver(std::shared_ptr<MpiAgent> agent) {
  static std::mutex mutex;
  static auto* agents = new std::vector<std::shared_ptr<MpiAgent>>();
  const std::lock_guard<std::mutex> lock(mutex);
  agents->push_back(std::move(agent));
}

} // namespace

bool MpiAgent::idle(ProgressToken& token) const {
  return calls_.size() == 0 && completing_.load() == 0 && serving_.load() == 0 && !hasQueued() &&
      exchange_.quiet(token);
}

void MpiAgent::join(bool shutdown, float timeout) {
  checkNotForked();
  TORCH_CHECK(timeout >= 0, "The timeout of join must not be negative, but is ", timeout);
  const auto result = join_.wait(options_.signals, timeout, shutdown, [this] { engine_->wake(); });
  TORCH_CHECK(
      result != Join::Result::kFailed, "A graceful shutdown of RPC is not possible: ", join_.failure(),
      ". Use rpc.shutdown(graceful=False)");
  TORCH_CHECK(
      result == Join::Result::kAgreed, "The graceful shutdown of RPC timed out after ", timeout,
      " s: ", whatJoinWaitsFor());
  agreed_ = shutdown;
}

std::string MpiAgent::whatJoinWaitsFor() const {
  std::string own;
  for (int peer = 0; peer < transport_->size(); ++peer) {
    if (const size_t pending = calls_.sizeOf(peer)) {
      own += c10::str(own.empty() ? "" : ", ", pending, " to ", members_.describe(peer));
    }
  }
  if (!own.empty()) {
    return "calls of this worker are unanswered: " + own;
  }
  if (const int64_t serving = serving_.load()) {
    return c10::str("this worker is still serving ", serving, " calls");
  }
  if (const int64_t completing = completing_.load()) {
    return c10::str("callbacks of ", completing, " calls of this worker are still running");
  }
  return "this worker is idle, but another one has not called shutdown or is still busy";
}

void MpiAgent::shutdownImpl() {
  if (inForkedChild() || !started_.exchange(false)) {
    return;
  }
  const bool agreed = agreed_;
  std::exception_ptr interrupted;
  const bool stopped = stopEngine(interrupted);
  if (!agreed) {
    sayGoodbye();
  }
  flush(interrupted);
  {
    const EngineWork work;
    std::vector<TaskPtr> dropped; // completes calls, and so without the token
    engine_->withToken([&](ProgressToken& token) {
      exchange_.close(token, agreed);
      dropped.swap(arrivals_);
    });
    dropped.clear();
    for (const PendingCall& call : calls_.close()) {
      completion_.fail(call, call.failure.empty() ? shutDownText() : call.failure);
    }
  }
  ReceivePool::instance().trim(Clock::time_point::max());
  if (!stopped) {
    LOG(WARNING) << "RPC on " << members_.describe(rank_) << " was shut down while " << engine_->counts().busy
                 << " functions called through it were still running";
    if (auto self = weak_from_this().lock()) {
      keepForEver(std::move(self));
    } else {
      (void)engine_->stop(std::chrono::hours(24 * 365)); // in the destructor: they still use this object
    }
  }
  if (interrupted != nullptr) {
    std::rethrow_exception(interrupted);
  }
}

bool MpiAgent::stopEngine(std::exception_ptr& interrupted) {
  const auto stop = [&](std::chrono::milliseconds limit) {
    const EngineWork work; // the calls of tasks that are dropped fail here
    return engine_->stop(limit);
  };
  if (!options_.signals.here()) {
    return stop(kRunningTasksLimit);
  }
  const auto limit = Clock::now() + kRunningTasksLimit;
  bool stopped = stop(kSignalInterval);
  while (!stopped && interrupted == nullptr && Clock::now() < limit) {
    serveSignals(interrupted);
    stopped = stop(kSignalInterval);
  }
  return stopped;
}

void MpiAgent::flush(std::exception_ptr& interrupted) {
  const auto limit = Clock::now() + kFlushLimit;
  bool unfinished = true;
  while (unfinished && interrupted == nullptr && Clock::now() < limit) {
    const auto pause = std::min<Clock::time_point>(limit, Clock::now() + kSignalInterval);
    engine_->withToken([&](ProgressToken& token) {
      try {
        while ((unfinished = exchange_.counters().unfinishedSends > 0) && Clock::now() < pause) {
          exchange_.poll(token);
        }
      } catch (const std::exception& error) {
        LOG(WARNING) << "RPC on " << members_.describe(rank_) << " could not flush while leaving: " << errorText(error);
        unfinished = false;
      }
    });
    if (unfinished && options_.signals.here()) {
      serveSignals(interrupted);
    }
  }
}

void MpiAgent::serveSignals(std::exception_ptr& interrupted) {
  try {
    options_.signals.serve();
  } catch (...) {
    interrupted = std::current_exception();
  }
}

std::string MpiAgent::shutDownText() const {
  return c10::str("RPC was shut down on ", members_.describe(rank_), " before this call was answered");
}

void MpiAgent::sayGoodbye() {
  std::string text = "it shut RPC down or exited without waiting for the others";
  const auto lost = members_.lost();
  if (!lost.empty()) { // the cause, for those that hear of this before they hear of that
    const std::string& reason = lost.front().reason;
    const size_t passedOn = reason.rfind(kCause); // that of a worker which had left for the same cause
    const size_t begin = passedOn == std::string::npos ? 0 : passedOn + kCause.size();
    text += std::string(kCause) + reason.substr(begin, kCauseLength);
  }
  engine_->withToken([&](ProgressToken& token) {
    try {
      for (int peer = 0; peer < transport_->size(); ++peer) {
        if (peer != rank_) {
          exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kGoodbye, text));
        }
      }
    } catch (const std::exception& error) {
      LOG(WARNING) << "RPC on " << members_.describe(rank_) << " could not say goodbye: " << errorText(error);
    }
  });
}

} // namespace torch_rpc_mpi
