#include "agent/leaving.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "agent/engine_work.h"
#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace {

// User code may run for ever. Leaving waits so long for what is running, then goes on without it.
constexpr auto kRunningTasksLimit = std::chrono::seconds(5);
// Goodbyes and the last drain frames are tiny; they are gone at once unless the peer is stuck.
constexpr auto kFlushLimit = std::chrono::milliseconds(500);
// In a goodbye; of which so many bytes at most, because that is to fit its frame.
constexpr std::string_view kCause = ", after it had lost another worker: ";
constexpr size_t kCauseLength = 400;

} // namespace

bool Leaving::leave(bool agreed) {
  const bool stopped = stopEngine();
  if (!agreed) {
    sayGoodbye();
  }
  flush();
  const EngineWork work;
  std::vector<TaskPtr> dropped; // completes calls, and so without the token
  engine_.withToken([&](ProgressToken& token) {
    exchange_.close(token, agreed);
    dropped = dispatcher_.takeArrivals(token);
  });
  dropped.clear();
  caller_.close(caller_.shutDownText());
  return stopped;
}

bool Leaving::stopEngine() {
  const auto stop = [&](std::chrono::milliseconds limit) {
    const EngineWork work; // the calls of tasks that are dropped fail here
    return engine_.stop(limit);
  };
  if (!signals_.here()) {
    return stop(kRunningTasksLimit);
  }
  const auto limit = Clock::now() + kRunningTasksLimit;
  bool stopped = stop(kSignalInterval);
  while (!stopped && interrupted_ == nullptr && Clock::now() < limit) {
    serveSignals();
    stopped = stop(kSignalInterval);
  }
  return stopped;
}

void Leaving::flush() {
  const auto limit = Clock::now() + kFlushLimit;
  bool unfinished = true;
  while (unfinished && interrupted_ == nullptr && Clock::now() < limit) {
    const auto pause = std::min<Clock::time_point>(limit, Clock::now() + kSignalInterval);
    engine_.withToken([&](ProgressToken& token) {
      try {
        while ((unfinished = !exchange_.counters().allSent()) && Clock::now() < pause) {
          exchange_.poll(token);
        }
      } catch (const std::exception& error) {
        LOG(WARNING) << "RPC on " << members_.describe(members_.rank())
                     << " could not flush while leaving: " << errorText(error);
        unfinished = false;
      }
    });
    if (unfinished && signals_.here()) {
      serveSignals();
    }
  }
}

void Leaving::serveSignals() {
  try {
    signals_.serve();
  } catch (...) {
    interrupted_ = std::current_exception();
  }
}

void Leaving::sayGoodbye() {
  std::string text = "it shut RPC down or exited without waiting for the others";
  const auto lost = members_.lost();
  if (!lost.empty()) { // the cause, for those that hear of this before they hear of that
    const std::string& reason = lost.front().reason;
    const size_t passedOn = reason.rfind(kCause); // that of a worker which had left for the same cause
    const size_t begin = passedOn == std::string::npos ? 0 : passedOn + kCause.size();
    text += std::string(kCause) + reason.substr(begin, kCauseLength);
  }
  engine_.withToken([&](ProgressToken& token) {
    try {
      for (int peer = 0; peer < static_cast<int>(members_.workers().size()); ++peer) {
        if (peer != members_.rank()) {
          exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kGoodbye, text));
        }
      }
    } catch (const std::exception& error) {
      LOG(WARNING) << "RPC on " << members_.describe(members_.rank()) << " could not say goodbye: " << errorText(error);
    }
  });
}

} // namespace torch_rpc_mpi
