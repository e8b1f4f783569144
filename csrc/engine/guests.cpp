// The part of ThreadedEngine that users' threads run, see Note [Guests].
#include <algorithm>
#include <exception>

#include <sched.h>

#include "base/error_text.h"
#include "engine/threaded_engine.h"

namespace torch_rpc_mpi {

namespace {

using Times = IdlingTimes;

thread_local bool guestComing = false;

} // namespace

void Engine::announceGuest(bool coming) {
  guestComing = coming;
}

bool Engine::guestAnnounced() {
  return guestComing;
}

bool ThreadedEngine::guestLeads() const {
  return guest_ || Clock::now().time_since_epoch().count() < guestUntil_;
}

void ThreadedEngine::driveFor(const void* awaited, const std::function<bool()>& over) {
  guestComing = false;
  TaskPtr mine;
  if (!guest_.exchange(true)) {
    const auto begin = Clock::now();
    const auto idleLimit = std::min<std::chrono::nanoseconds>(options_.idling.spinTime, Times::kLongestStay);
    int activeTurns = 0;
    while (mine == nullptr && !over() && !stopping_ && !broken_) {
      if (!turnAsGuest(awaited, mine)) {
        if (Clock::now() - begin > idleLimit) {
          break;
        }
        sched_yield();
      } else if (++activeTurns % Times::kTurnsPerLook == 0 && Clock::now() - begin > Times::kLongestStay) {
        break;
      }
    }
    const bool neededOn = (mine == nullptr && !over()) || driver_.awaitsAnswers() || driver_.hasQueued();
    guestUntil_ = neededOn ? 0 : (Clock::now() + Times::kTick).time_since_epoch().count();
    guest_ = false;
    if (neededOn || asleep_) {
      wakeLeader();
    }
  } else {
    doorbell_.ring();
  }
  if (mine != nullptr) {
    mine->run();
  }
}

bool ThreadedEngine::turnAsGuest(const void* awaited, TaskPtr& mine) {
  try {
    const Turn turn = turnOnce(awaited, &mine);
    if (mine != nullptr) {
      (void)turnForSenders();
    }
    return turn.active;
  } catch (const std::exception& error) {
    breakDown(errorText(error));
    return false;
  }
}

} // namespace torch_rpc_mpi
