#include "python/watchdog.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <optional>
#include <utility>

#include <unistd.h>

#include "base/deadline.h"
#include "host/resources.h"
#include "launch/shared_files.h"

namespace torch_rpc_mpi {

namespace {

constexpr auto kLookInterval = std::chrono::milliseconds(50);

} // namespace

InitWatchdog::InitWatchdog(
    std::string what,
    double warnAfter,
    double abortAfter,
    std::shared_ptr<Companions> companions,
    std::string world)
    : what_(std::move(what)),
      warnAfter_(warnAfter),
      abortAfter_(abortAfter),
      companions_(std::move(companions)),
      world_(std::move(world)),
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
    const auto look = companions_ == nullptr ? until : std::min<Clock::time_point>(until, Clock::now() + kLookInterval);
    if (changed_.wait_until(lock, look, [this] { return cancelled_; })) {
      return;
    }
    if (const auto lost = companions_ == nullptr ? std::nullopt : companions_->ended()) {
      endProcess(*lost + " has ended (it crashed or was killed), and there is no way out of " + what_);
    }
    if (Clock::now() < until) {
      continue;
    }
    std::array<char, 64> time{};
    if (last) {
      std::snprintf(time.data(), time.size(), "gave up after %g s: ", abortAfter_.count());
      endProcess(time.data() + what_);
    }
    std::fprintf(stderr, "torch_rpc_mpi: still waiting after %g s: %s\n", next.count(), what_.c_str());
    std::fflush(stderr);
    next *= 2;
  }
}

void InitWatchdog::endProcess(const std::string& why) const {
  std::fprintf(stderr, "torch_rpc_mpi: %s. Ending this process.\n", why.c_str());
  std::fflush(stderr);
  if (!world_.empty()) {
    removeSharedFiles(world_);
  }
  _exit(1);
}

} // namespace torch_rpc_mpi
