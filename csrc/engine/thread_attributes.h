// What the kernel knows of a thread, and passes on to the processes and threads that it starts.
#pragma once

#include <csignal>
#include <optional>

#include <sched.h>

namespace torch_rpc_mpi {

// Scheduling policy, cores and blocked signals: those of the thread that makes the object. Immutable.
class ThreadAttributes {
 public:
  ThreadAttributes();

  // For a thread of the engine, whoever has started it: the same cores and signals; and from now on waits() and runs()
  // have an effect in it, see Note [Sharing cores] in threaded_engine.h. Not if the user has chosen a policy.
  void adopt() const;

  // This thread is about to wait, or to run what a user may have written. Cheap if it did the same before.
  static void waits();
  static void runs();

 private:
  int policy_;
  std::optional<cpu_set_t> cores_;
  sigset_t blocked_;
};

} // namespace torch_rpc_mpi
