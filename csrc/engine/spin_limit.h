// How long a thread that finds nothing goes on polling.
#pragma once

#include <algorithm>
#include <chrono>

#include "engine/task.h"

namespace torch_rpc_mpi {

// Where ranks share cores, a thread that polls may keep another rank from the work that it polls for: sched_yield()
// need not give up the core, so each look in vain can last for the rest of a time slice, and all ranks together take
// turns at that. A thread that was away from its core for longer than a look takes knows that others want it; for some
// time after that the limit is short, and it sleeps at the doorbell instead.
//
// Used by one thread at a time.
class SpinLimit {
 public:
  SpinLimit(std::chrono::nanoseconds usual, bool crowded) : usual_(usual), crowded_(crowded) {}

  // lastLook: when the thread that looks now, in vain, began to look before.
  std::chrono::nanoseconds at(Clock::time_point now, Clock::time_point lastLook) {
    if (crowded_ && now - lastLook > kAway) {
      shortUntil_ = now + kRemembered;
    }
    return now < shortUntil_ ? std::min<std::chrono::nanoseconds>(usual_, kShort) : usual_;
  }

  static constexpr std::chrono::microseconds kAway{50};
  static constexpr std::chrono::microseconds kShort{30};
  static constexpr std::chrono::milliseconds kRemembered{10};

 private:
  const std::chrono::nanoseconds usual_;
  const bool crowded_;
  Clock::time_point shortUntil_{};
};

} // namespace torch_rpc_mpi
