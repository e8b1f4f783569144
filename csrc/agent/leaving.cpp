#include "agent/leaving.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "agent/engine_work.h"
#include "agent/farewell.h"
#include "base/error_text.h"
#include "peer/outbound_control.h"

namespace torch_rpc_mpi {

namespace {

// What is running has so long to answer before the peers hear that this worker leaves, and fail the calls that are
// left.
constexpr auto kAnswersLimit = std::chrono::milliseconds(200);
// User code may run for ever. Leaving waits so long for what is running, then goes on without it.
constexpr auto kRunningTasksLimit = std::chrono::seconds(5);
// Goodbyes and the last drain frames are tiny; they are gone at once unless the peer is stuck.
constexpr auto kFlushLimit = std::chrono::milliseconds(500);

} // namespace

bool Leaving::leave(bool agreed, const std::optional<std::string>& farewell) {
  const bool stopped = stopEngine(agreed ? kRunningTasksLimit : kAnswersLimit);
  if (!agreed && farewell) {
    sayGoodbye(*farewell);
  }
  flush();
  const EngineWork work;
  std::vector<TaskPtr> dropped; // completes calls, and so without the token
  engine_.withToken([&](ProgressToken& token) {
    exchange_.close(token, agreed);
    dropped = dispatcher_.takeArrivals(token);
  });
  dropped.clear();
  caller_.close();
  if (!stopped && (agreed || farewell)) { // else it is for the process to end at once
    return stopEngine(kRunningTasksLimit);
  }
  return stopped;
}

bool Leaving::stopEngine(std::chrono::milliseconds limit) {
  const auto stop = [&](std::chrono::milliseconds wait) {
    const EngineWork work; // the calls of tasks that are dropped fail here
    return engine_.stop(wait);
  };
  if (!signals_.here()) {
    return stop(limit);
  }
  const auto end = Clock::now() + limit;
  bool stopped = stop(kSignalInterval);
  while (!stopped && interrupted_ == nullptr && Clock::now() < end) {
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

void Leaving::sayGoodbye(const std::string& text) {
  const auto lost = members_.lost();
  const std::string body = writeFarewell({text, lost.empty() ? "" : lost.front().cause});
  engine_.withToken([&](ProgressToken& token) {
    try {
      for (int peer = 0; peer < static_cast<int>(members_.workers().size()); ++peer) {
        if (peer != members_.rank()) {
          exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kGoodbye, body));
        }
      }
    } catch (const std::exception& error) {
      LOG(WARNING) << "RPC on " << members_.describe(members_.rank()) << " could not say goodbye: " << errorText(error);
    }
  });
}

} // namespace torch_rpc_mpi
