// The thread-local state of torch under which the callbacks of a call's future run.
//
// Note [Thread state]
// ~~~~~~~~~~~~~~~~~~~
// What is attached to the future of a call runs with the grad mode, profiler, modes and so on of the thread that made
// the call, as torch's own entry points see to with at::wrapPropagateTLSState(). But an at::ThreadLocalState takes 1.1
// KB, in three pieces of memory, which every call that waits for its answer would hold, and to set one takes another.
// In most calls all of it is as in any new thread. Those keep nothing but that, and callbacks run as they are where
// that is so as well, which it is in the engine's threads.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include <ATen/ThreadLocalState.h>

namespace torch_rpc_mpi {

// That of the thread which made the object. Immutable.
class ThreadState {
 public:
  ThreadState();

  // This thread has the state while the guard lives, and then what it had before.
  class Guard {
   public:
    explicit Guard(const ThreadState& state);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    std::optional<at::ThreadLocalStateGuard> all_;
    at::impl::ThreadLocalPythonObjects before_; // if not all_
  };

 private:
  std::shared_ptr<const at::ThreadLocalState> all_; // null: as in a new thread, but for:
  at::impl::ThreadLocalPythonObjects objects_;      // because these do not tell whether there are any
};

// A callback that runs with the state which this thread has now.
template <typename Callback>
auto withThreadState(Callback callback) {
  return [state = ThreadState(), callback = std::move(callback)](auto&&... args) {
    const ThreadState::Guard guard(state);
    return callback(std::forward<decltype(args)>(args)...);
  };
}

} // namespace torch_rpc_mpi
