// How much the other threads of the process get done while one of them polls.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "engine/task.h"

namespace torch_rpc_mpi {

// Used by the polling thread alone; the count it looks at is written by others.
class RecentWork {
 public:
  // count: of the pieces of work done, ever growing.
  RecentWork(const std::atomic<uint64_t>& count, Clock::time_point now) : count_(count), before_(count), since_(now) {}

  // Whether in the last kWindow that ended there was a piece every kWindow / kMuch on average.
  bool isMuch(Clock::time_point now) {
    if (now - since_ >= kWindow) {
      const uint64_t count = count_;
      much_ = (count - before_) * kWindow >= kMuch * (now - since_);
      before_ = count;
      since_ = now;
    }
    return much_;
  }

 private:
  static constexpr auto kWindow = std::chrono::microseconds(100);
  static constexpr uint64_t kMuch = 3;

  const std::atomic<uint64_t>& count_;
  uint64_t before_;
  Clock::time_point since_;
  bool much_ = false;
};

} // namespace torch_rpc_mpi
