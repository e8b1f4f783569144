// What a thread does for the engine, and where that gives way to users' code.
#pragma once

#include <utility>

#include "torch_compat/thread_state.h"

namespace torch_rpc_mpi {

// While one lives, this thread works for the engine, an engine thread or a user's that sends, waits or completes: under
// the torch state of a new thread, and users' code that it comes to runs as in a thread of its own (UserCode in
// python/user_code.h), not as a part of what the thread ran before.
class EngineWork {
 public:
  // alsoRecorded: see NewThreadState.
  explicit EngineWork(bool alsoRecorded = false) : state_(alsoRecorded) {}
  ~EngineWork() {
    underWay() = before_;
  }
  EngineWork(const EngineWork&) = delete;
  EngineWork& operator=(const EngineWork&) = delete;

  // Whether this thread's next step is the engine's. False in users' code, also in what an engine thread runs of it.
  static bool& underWay() {
    thread_local bool is = false;
    return is;
  }

 private:
  const bool before_ = std::exchange(underWay(), true);
  const NewThreadState state_;
};

} // namespace torch_rpc_mpi
