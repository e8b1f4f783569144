// A piece of work for an engine thread.
#pragma once

#include <cstddef>
#include <memory>

#include "base/clock.h"

namespace torch_rpc_mpi {

class Task {
 public:
  enum class Kind : size_t {
    kCompletion,   // completes a future, releases memory: short, must not wait behind requests
    kRequest,      // runs what a peer asked for: as long as the user's function takes
    kSecondAttempt // a request that has been here before: see Note [Second attempts]
  };
  virtual ~Task() = default;
  virtual Kind kind() const = 0;
  virtual void run() noexcept = 0;
  // Whether this is the completion that `awaited` (a future's address) waits for.
  virtual bool completes(const void* /*awaited*/) const {
    return false;
  }
};
using TaskPtr = std::unique_ptr<Task>;

} // namespace torch_rpc_mpi
