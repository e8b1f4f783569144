// The tasks in which calls are completed.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "agent/completion.h"
#include "engine/engine.h"

namespace torch_rpc_mpi {

// Completes the future of a call, whatever becomes of the task: if the engine stops before it has run, with an error.
// The call counts as completing() from give() on. Of one thread at a time.
class CompletionTask : public Task {
 public:
  explicit CompletionTask(Completion& completion) : completion_(completion) {}
  ~CompletionTask() override {
    if (call_.future != nullptr) {
      completion_.fail(call_, [this] { return completion_.shutDownText(); });
    }
    if (counted_) {
      completion_.completing_.fetch_sub(1);
    }
  }
  Kind kind() const override {
    return Kind::kCompletion;
  }
  bool completes(const void* awaited) const override {
    return call_.future.get() == awaited;
  }
  void give(PendingCall call) noexcept {
    count();
    call_ = std::move(call);
  }
  void count() noexcept { // also without a call
    completion_.completing_.fetch_add(1);
    counted_ = true;
  }

 protected:
  const Completion& completion() const {
    return completion_;
  }
  PendingCall take() {
    return std::exchange(call_, PendingCall());
  }

 private:
  Completion& completion_;
  PendingCall call_;
  bool counted_ = false;
};

// So that the next push_back() does not throw: the call that its task completes is in no table any more.
inline void makeRoom(std::vector<TaskPtr>& tasks) {
  if (tasks.size() == tasks.capacity()) {
    tasks.reserve(std::max<size_t>(2 * tasks.size(), 8));
  }
}

} // namespace torch_rpc_mpi
