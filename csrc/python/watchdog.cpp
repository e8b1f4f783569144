#include "python/watchdog.h"

#include <cstdio>

#include <unistd.h>

#include "base/deadline.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

InitWatchdog::InitWatchdog(std::string what, double warnAfter, double abortAfter)
    : what_(std::move(what)),
      warnAfter_(warnAfter),
      abortAfter_(abortAfter),
      secondInterrupt_(
          "ended by a second Ctrl-C, because the first cannot interrupt " + what_,
          [](double) { return true; }),
      thread_(startThread("what looks after MPI_Init", [this] { watch(); })) {}

InitWatchdog::~InitWatchdog() {
  cancel();
}

void InitWatchdog::cancel() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancelled_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) {
    thread_.join();
  }
  secondInterrupt_.cancel();
}

void InitWatchdog::watch() {
  const auto start = Clock::now();
  auto next = warnAfter_;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const bool last = abortAfter_.count() > 0 && next >= abortAfter_;
    const auto until = start + durationOf<std::chrono::nanoseconds>((last ? abortAfter_ : next).count());
    if (changed_.wait_until(lock, until, [this] { return cancelled_; })) {
      return;
    }
    if (last) {
      std::fprintf(
          stderr, "torch_rpc_mpi: gave up after %g s: %s. Ending this process.\n", abortAfter_.count(), what_.c_str());
      std::fflush(stderr);
      _exit(1);
    }
    std::fprintf(stderr, "torch_rpc_mpi: still waiting after %g s: %s\n", next.count(), what_.c_str());
    std::fflush(stderr);
    next *= 2;
  }
}

} // namespace torch_rpc_mpi
