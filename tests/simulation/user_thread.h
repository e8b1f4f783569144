// A user's thread that may block, in join() or shutdown() or for an answer: a real one, but only one thread of the
// simulation runs at any time. The one that runs has the baton; each wait of production code, which would serve signals
// there, hands it back.
#pragma once

#include <functional>
#include <semaphore>
#include <stdexcept>
#include <thread>

#include "base/signal_service.h"

namespace torch_rpc_mpi::simulation {

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted by a signal") {}
};

class UserThread {
 public:
  UserThread() : thread_([this] { loop(); }) {}
  ~UserThread();
  UserThread(const UserThread&) = delete;
  UserThread& operator=(const UserThread&) = delete;

  bool busy() const {
    return static_cast<bool>(job_);
  }
  // Only while it is not busy. The job throws nothing.
  void give(std::function<void()> job) {
    job_ = std::move(job);
  }
  // Of a busy one, by whoever has the baton: it runs until it waits, or its job has ended.
  void resume();
  // Its wait throws Interrupted, at its next turn.
  void interrupt() {
    interrupted_ = true;
  }

  static bool here() {
    return current != nullptr;
  }
  // Hands the baton back for a while, without a wait that a signal could end.
  static void pause() {
    current->handBack();
  }
  static SignalService service() {
    return {here, [] { current->serve(); }};
  }

 private:
  void loop();
  void handBack();
  void serve();

  static inline thread_local UserThread* current = nullptr;
  std::function<void()> job_;
  bool interrupted_ = false;
  bool ends_ = false;
  std::binary_semaphore mayRun_{0}, hasPaused_{0};
  std::thread thread_;
};

} // namespace torch_rpc_mpi::simulation
