#include "agent/request_states.h"

#include <algorithm>
#include <chrono>
#include <string_view>

namespace torch_rpc_mpi {

Statement RequestStates::of(ProgressToken& token, int source, const std::vector<uint64_t>& ids) const {
  Statement statement;
  statement.business = business();
  for (const uint64_t id : ids) {
    statement.calls.push_back(of(token, source, id));
  }
  return statement;
}

Business RequestStates::business() const {
  const EngineCounts counts = engine_->counts();
  Business business;
  business.workerThreads = static_cast<uint32_t>(numWorkerThreads_);
  business.running = static_cast<uint32_t>(counts.runningRequests);
  business.waiting = static_cast<uint32_t>(counts.waitingRequests);
  running_.oldest([&](const RunningRequests::Request& request) {
    business.oldestSeconds = std::chrono::duration<float>(Clock::now() - request.since()).count();
    const std::string_view name = request.function();
    std::copy_n(name.begin(), std::min(name.size(), business.oldest.size() - 1), business.oldest.begin());
  });
  return business;
}

LateCall RequestStates::of(ProgressToken& token, int source, uint64_t id) const {
  LateCall call;
  call.id = id;
  if (const Task* const unbegun = unbegun_.taskOf(source, id)) {
    call.state = LateCall::State::kQueued;
    // Or, if it is not with the engine yet, behind all that are.
    const auto before = engine_->queuedBefore([&](const Task& task) { return &task == unbegun; });
    call.before = static_cast<uint32_t>(before.value_or(engine_->counts().queuedRequests));
    return call;
  }
  running_.find(source, id, [&](const RunningRequests::Request& request) {
    call.state = request.promised() ? LateCall::State::kPromised : LateCall::State::kRunning;
    call.seconds = std::chrono::duration<float>(Clock::now() - request.since()).count();
  });
  if (call.state == LateCall::State::kAnswered && source != rank_ &&
      exchange_.lacksPartOf(token, source, FrameKind::kRequest, id)) {
    call.state = LateCall::State::kArriving;
  }
  return call;
}

} // namespace torch_rpc_mpi
