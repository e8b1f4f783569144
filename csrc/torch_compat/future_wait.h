// What torch's future waits with. Its own wait() knows no time limit, and a callback in its place would be called after
// those that were added before, which may take long. The members have these names and types in torch 2.6 to 2.14.
#pragma once

#include <condition_variable>
#include <mutex>

#include <ATen/core/ivalue.h>

#include "torch_compat/private_member.h"

namespace torch_rpc_mpi::torch_compat {

struct FutureMutex {
  using type = std::mutex c10::ivalue::Future::*;
  friend type memberOf(FutureMutex);
};
template struct GrantMember<FutureMutex, &c10::ivalue::Future::mutex_>;

struct FutureFinished {
  using type = std::condition_variable c10::ivalue::Future::*;
  friend type memberOf(FutureFinished);
};
template struct GrantMember<FutureFinished, &c10::ivalue::Future::finished_cv_>;

// Guards completed().
inline std::mutex& mutexOf(c10::ivalue::Future& future) {
  return future.*memberOf(FutureMutex());
}

// Tells when completed() holds.
inline std::condition_variable& finishedOf(c10::ivalue::Future& future) {
  return future.*memberOf(FutureFinished());
}

} // namespace torch_rpc_mpi::torch_compat
