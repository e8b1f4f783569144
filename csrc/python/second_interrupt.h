// Ctrl-C where Python cannot act on it.
//
// Note [A second Ctrl-C]
// ~~~~~~~~~~~~~~~~~~~~~~
// Some waits cannot be interrupted for Python's handlers of signals: MPI_Init, and those that TorchScript and torch's
// autograd engine enter by themselves. Who presses Ctrl-C again there wants the process to end. So, while such a wait
// is possible, SIGINT passes through a handler of ours to Python's, and wakes a thread that watches. After the first
// one the thread has Python make a "pending call", which Python's main thread makes as soon as it runs Python again,
// after the handlers of signals. If that has not happened when another SIGINT comes, and the main thread waits, the
// thread that watches ends the process, by SIGINT as it would end a program that has no handler.
//
// Only where SIGINT has Python's own handler, which raises KeyboardInterrupt. One that a user puts in its place later
// replaces ours as well, and nothing of this happens then.
#pragma once

#include <functional>
#include <string>

namespace torch_rpc_mpi {

class SecondInterrupt {
 public:
  // Whether the main thread may be in a wait of the kind meant. busy: the share of a core that it has used since the
  // first SIGINT. Called by the thread that watches, without the GIL.
  using Waits = std::function<bool(double busy)>;

  // Ends a launcher's job with this process. Called by the thread that watches, without the GIL.
  using EndJob = std::function<void(int status)>;

  // With the GIL. text: who ends, and why the first one had no effect. endJob: null where there is none. Does nothing
  // while there is another such object.
  SecondInterrupt(std::string text, Waits waits, EndJob endJob = nullptr);
  ~SecondInterrupt();
  SecondInterrupt(const SecondInterrupt&) = delete;
  SecondInterrupt& operator=(const SecondInterrupt&) = delete;
  // Idempotent; one thread at a time. Not for the thread that watches.
  void cancel();

 private:
  bool active_ = false;
};

} // namespace torch_rpc_mpi
