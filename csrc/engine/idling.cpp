#include "engine/idling.h"

#include <algorithm>

namespace torch_rpc_mpi {

using Times = IdlingTimes;

void Idling::begin(Clock::time_point now) {
  spinning_ = true;
  nextSleep_ = Times::kFirstSleep;
  lastActivity_ = now;
  lastLook_ = now;
  workBefore_ = workDone_;
  windowBegan_ = now;
  much_ = false;
}

Idling::Step Idling::next(bool found, bool rests, Clock::time_point now) {
  Step step;
  if (found) {
    lastActivity_ = now;
    nextSleep_ = Times::kFirstSleep;
    spinning_ = true;
  } else if (options_.scarce && othersWorkMuch(now)) {
    lastActivity_ = now;
    step.pause = Pause::kNap; // and not at the doorbell: nobody is to ring
  } else if (spinning_) {
    spinning_ = now - lastActivity_ < spinLimit(now);
    step.pause = spinning_ ? Pause::kYield : Pause::kNone;
  } else {
    nextSleep_ = std::min(2 * nextSleep_, rests ? std::max(options_.maxRest, options_.maxSleep) : options_.maxSleep);
  }
  lastLook_ = now;
  step.sleep = spinning_ ? std::chrono::nanoseconds(0) : nextSleep_;
  return step;
}

bool Idling::othersWorkMuch(Clock::time_point now) {
  if (now - windowBegan_ >= Times::kWindow) {
    const uint64_t work = workDone_;
    much_ = (work - workBefore_) * Times::kWindow >= Times::kMuch * (now - windowBegan_);
    workBefore_ = work;
    windowBegan_ = now;
  }
  return much_;
}

// Where ranks share cores, a thread that polls may keep another rank from the work that it polls for: sched_yield()
// need not give up the core, so each look in vain can last for the rest of a time slice, and all ranks together take
// turns at that. A thread that was away from its core for longer than a look takes knows that others want it.
std::chrono::nanoseconds Idling::spinLimit(Clock::time_point now) {
  if (options_.crowded && now - lastLook_ > Times::kAway) {
    brieflyUntil_ = now + Times::kRemembered;
  }
  return now < brieflyUntil_ ? std::min<std::chrono::nanoseconds>(options_.spinTime, Times::kBriefly)
                             : options_.spinTime;
}

} // namespace torch_rpc_mpi
