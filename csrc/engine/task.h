// A piece of work for an engine thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/clock.h"

namespace torch_rpc_mpi {

class Task {
 public:
  enum class Kind : size_t {
    kCompletion,   // completes a future, releases memory: short, must not wait behind requests
    kRequest,      // runs what a peer asked for: as long as the user's function takes
    kCreation,     // a request that may make a value for which others wait: see Note [Creations]
    kSecondAttempt // a request that has been here before: see Note [Second attempts]
  };
  virtual ~Task() = default;
  virtual Kind kind() const = 0;
  uint64_t place = 0; // of a request in its queue, by TaskLanes
  virtual void run() noexcept = 0;
  // Whether this is the completion that `awaited` (a future's address) waits for.
  virtual bool completes(const void* /*awaited*/) const {
    return false;
  }
};
using TaskPtr = std::unique_ptr<Task>;

// Takes the completion that `awaited` waits for out of these; null if it is not among them.
inline TaskPtr takeCompletionOf(const void* awaited, std::vector<TaskPtr>& tasks) {
  const auto found =
      std::find_if(tasks.begin(), tasks.end(), [&](const TaskPtr& task) { return task->completes(awaited); });
  if (found == tasks.end()) {
    return nullptr;
  }
  TaskPtr task = std::move(*found);
  tasks.erase(found);
  return task;
}

} // namespace torch_rpc_mpi
