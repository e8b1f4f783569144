// The thread-local state of torch (grad mode, modes, autocast, profiler and so on) under which code runs here.
//
// Note [Thread state]
// ~~~~~~~~~~~~~~~~~~~
// Three rules, whatever thread does the work:
// - What is done for the engine, messages written and read, calls completed, is done under the state of a new thread
//   (EngineWork in agent/engine_work.h), so that a user's thread that does it while it waits keeps its modes to itself.
// - What is attached to the future of a call runs with the state of the thread that made the call, as torch's own entry
//   points see to with at::wrapPropagateTLSState(): withThreadState().
// - What a function or a callback sets ends with it: KeptThreadState.
//
// An at::ThreadLocalState takes 1.1 KB, in three pieces of memory, which every call that waits for its answer would
// hold, and to set one takes another. In most calls all of it is as in any new thread. Those keep nothing but that, and
// nothing is set where that is so already. To look takes about a tenth of a microsecond, so a thread remembers it while
// it works for the engine.
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

  // Gives it to this thread.
  void set() const;
  static void setNew();

  bool isNew() const {
    return all_ == nullptr && objects_ == nullptr;
  }

  class Guard;

 private:
  std::shared_ptr<const at::ThreadLocalState> all_;                   // null: as in a new thread, but for:
  std::shared_ptr<const at::impl::ThreadLocalPythonObjects> objects_; // null: none
};

// Whether this thread is known to have the state of a new one, but for a profiler that torch sets up for the time in
// which it serves a request. Of this thread alone, for the classes below.
inline bool& knownAsNew() {
  thread_local bool known = false;
  return known;
}

// What this thread has at the beginning, it has again at the end, whatever was set between.
class KeptThreadState {
 public:
  KeptThreadState();
  ~KeptThreadState();
  KeptThreadState(const KeptThreadState&) = delete;
  KeptThreadState& operator=(const KeptThreadState&) = delete;

 private:
  const bool wasKnown_;
  const bool autocastCaches_;        // no part of an at::ThreadLocalState
  std::optional<ThreadState> state_; // if not known
};

// This thread has the state while the guard lives, and then what it had before.
class ThreadState::Guard {
 public:
  explicit Guard(const ThreadState& state) {
    if (!(state.isNew() && knownAsNew())) {
      before_.emplace();
      state.set();
    }
  }

 private:
  std::optional<KeptThreadState> before_;
};

// This thread has the state of a new one while the object lives, but for what torch passes along with a call on purpose
// where `alsoRecorded`: whether gradients are recorded, and the profiler. Nothing may be set meanwhile and left set.
class NewThreadState {
 public:
  explicit NewThreadState(bool alsoRecorded = false);
  ~NewThreadState() {
    knownAsNew() = wasKnown_;
  }
  NewThreadState(const NewThreadState&) = delete;
  NewThreadState& operator=(const NewThreadState&) = delete;

 private:
  const bool wasKnown_ = knownAsNew();
  std::optional<KeptThreadState> before_; // if it had another
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
