// Seconds, as users give them, as a clock counts them: however many they are.
#pragma once

#include <algorithm>
#include <chrono>

#include "base/clock.h"

namespace torch_rpc_mpi {

// Longer waits have no end: 30 years. A clock's 64 bits of nanoseconds overflow at nine times that.
inline constexpr double kLongestWait = 1e9;

// At most kLongestWait; negative ones are none.
template <typename Duration>
Duration durationOf(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(std::clamp(seconds, 0.0, kLongestWait)));
}

// In so many seconds; 0, or more than kLongestWait: never.
inline Clock::time_point deadlineAfter(double seconds) {
  const bool ends = seconds > 0 && seconds <= kLongestWait;
  return ends ? Clock::now() + durationOf<Clock::duration>(seconds) : Clock::time_point::max();
}

} // namespace torch_rpc_mpi
