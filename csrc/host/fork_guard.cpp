#include "host/fork_guard.h"

#include <atomic>
#include <mutex>

#include <pthread.h>

namespace torch_rpc_mpi {

namespace {

std::atomic<bool> forkedChild{false};

} // namespace

void watchForks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forkedChild = true; }); });
}

bool inForkedChild() {
  return forkedChild.load(std::memory_order_relaxed);
}

} // namespace torch_rpc_mpi
