#include "user_thread.h"

#include <utility>

namespace torch_rpc_mpi::simulation {

UserThread::~UserThread() {
  ends_ = true;
  mayRun_.release();
  thread_.join();
}

void UserThread::resume() {
  mayRun_.release();
  hasPaused_.acquire();
}

void UserThread::loop() {
  current = this;
  for (;;) {
    mayRun_.acquire();
    if (ends_) {
      return;
    }
    interrupted_ = false; // of the run before, in which nobody was left to take it
    job_();
    job_ = nullptr;
    hasPaused_.release();
  }
}

void UserThread::handBack() {
  hasPaused_.release();
  mayRun_.acquire();
}

void UserThread::serve() {
  handBack();
  if (std::exchange(interrupted_, false)) {
    throw Interrupted();
  }
}

} // namespace torch_rpc_mpi::simulation
