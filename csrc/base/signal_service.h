// Waits that a thread interrupts now and then, to serve the signals of its process.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "base/clock.h"

namespace torch_rpc_mpi {

// Python runs the handlers of signals in one thread alone, between two of its instructions: where that thread waits in
// C++, it has to ask for them. The core knows no Python; the bindings put this in (python/signals.h). Immutable.
struct SignalService {
  bool (*here)() = [] { return false; }; // whether this thread is the one
  void (*serve)() = [] {};               // runs what is due; called without any lock; what it throws ends the wait
};

// How long such a thread waits before it asks again. A handler is to run within 0.1 s; what this leaves of it is for a
// guest that drives progress (engine/guests.cpp) and for getting hold of the interpreter.
inline constexpr std::chrono::milliseconds kSignalInterval{40};

// Waits until `over` holds, which `lock` guards and of which `changed` tells, or until the deadline (max(): none).
// Returns whether it holds.
template <typename Over>
bool waitServing(
    const SignalService& signals,
    std::unique_lock<std::mutex>& lock,
    std::condition_variable& changed,
    Clock::time_point deadline,
    const Over& over) {
  const bool serves = signals.here();
  if (!serves && deadline == Clock::time_point::max()) {
    changed.wait(lock, over);
    return true;
  }
  for (;;) {
    const auto until = serves ? std::min(deadline, Clock::now() + kSignalInterval) : deadline;
    if (changed.wait_until(lock, until, over)) {
      return true;
    }
    if (until == deadline && Clock::now() >= deadline) {
      return false;
    }
    lock.unlock();
    signals.serve();
    lock.lock();
  }
}

} // namespace torch_rpc_mpi
