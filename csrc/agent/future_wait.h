// The wait for a future, in which a thread serves signals.
#pragma once

#include "base/signal_service.h"
#include "torch_compat/future_wait.h"

namespace torch_rpc_mpi {

// Returns when the future is complete; at once where signals are not served in this thread. torch's own wait(), which
// is to follow, waits in that case, and synchronises devices.
inline void serveUntilCompleted(const SignalService& signals, c10::ivalue::Future& future) {
  if (future.completed() || !signals.here()) {
    return;
  }
  std::unique_lock<std::mutex> lock(torch_compat::mutexOf(future));
  waitServing(
      signals, lock, torch_compat::finishedOf(future), Clock::time_point::max(), [&] { return future.completed(); });
}

} // namespace torch_rpc_mpi
