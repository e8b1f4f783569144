// The clock of everything here.
#pragma once

#include <atomic>
#include <chrono>

namespace torch_rpc_mpi {

// std::chrono::steady_clock, unless a simulation gives the time.
struct Clock {
  using duration = std::chrono::steady_clock::duration;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::steady_clock::time_point;
  static constexpr bool is_steady = true;

  static time_point now() {
    const std::atomic<rep>* const time = simulated_.load(std::memory_order_relaxed);
    return time == nullptr ? std::chrono::steady_clock::now() : time_point(duration(time->load()));
  }

  // From now on `time`, which must be early, tells the time; null: the real clock again.
  static void simulate(const std::atomic<rep>* time) {
    simulated_ = time;
  }

 private:
  static inline std::atomic<const std::atomic<rep>*> simulated_{nullptr};
};

} // namespace torch_rpc_mpi
