#include "engine/thread_attributes.h"

#include <pthread.h>

namespace torch_rpc_mpi {

namespace {

// Of this thread, if it may be changed.
thread_local std::optional<int> currentPolicy;

// Refused: it works without.
bool setPolicy(int policy) {
  const sched_param none{};
  return sched_setscheduler(0, policy, &none) == 0;
}

void changePolicy(int policy) {
  if (currentPolicy && *currentPolicy != policy) {
    if (setPolicy(policy)) {
      currentPolicy = policy;
    } else {
      currentPolicy.reset();
    }
  }
}

} // namespace

ThreadAttributes::ThreadAttributes() : policy_(sched_getscheduler(0)), cores_(std::in_place), blocked_() {
  if (sched_getaffinity(0, sizeof(*cores_), &*cores_) != 0) {
    cores_.reset(); // more cores than the set holds
  }
  pthread_sigmask(SIG_SETMASK, nullptr, &blocked_);
}

void ThreadAttributes::adopt() const {
  if (cores_) {
    (void)sched_setaffinity(0, sizeof(*cores_), &*cores_);
  }
  pthread_sigmask(SIG_SETMASK, &blocked_, nullptr);
  if (policy_ == SCHED_OTHER && setPolicy(SCHED_BATCH)) {
    currentPolicy = SCHED_BATCH;
  }
}

void ThreadAttributes::waits() {
  changePolicy(SCHED_BATCH);
}

void ThreadAttributes::runs() {
  changePolicy(SCHED_OTHER);
}

} // namespace torch_rpc_mpi
