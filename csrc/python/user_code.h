// Users' Python code that a thread runs for the engine.
//
// Note [State of threads]
// ~~~~~~~~~~~~~~~~~~~~~~~
// A function that a peer calls expects a thread of its own, as TensorPipe's threads make a new Python thread state for
// each. Engine threads keep theirs, which costs less (Note [Python thread state] in interpreter.cpp), and a user's
// thread that reads its answer while it waits is in the middle of something else. So what code has set for its thread
// would be met by the next: context variables (decimal's and numpy's settings among them), thread-local values, the
// running event loop, tracing functions, torch's modes, the treatment of denormal numbers.
//
// Instead of making a thread state, the parts of the present one that hold these are put aside, and are empty as in a
// new one; Python makes them when they are first asked for. At the end they are dropped, if they were made, and the
// others put back. Code that sets nothing pays for moving a few pointers. Python, and modules that remember what they
// found for a thread (asyncio, contextvars), go by the number of the thread state, which is another one meanwhile.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/utils/pythoncapi_compat.h>

#include "python/float_control.h"
#include "torch_compat/thread_state.h"

namespace torch_rpc_mpi {

// While it lives, this thread runs users' code, which begins with nothing that is set and leaves nothing behind. In a
// thread that runs users' code already, this is a part of that and changes nothing. Made and destroyed with the GIL.
class UserCode {
 public:
  UserCode();
  ~UserCode();
  UserCode(const UserCode&) = delete;
  UserCode& operator=(const UserCode&) = delete;

 private:
  // What a Python thread state holds for the code that runs in it.
  struct Held {
    decltype(PyThreadState::id) id = 0;
    decltype(PyThreadState::context_ver) contextVersion = 0;
    PyObject* values = nullptr; // thread-local ones
    PyObject* context = nullptr;
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* localKey = nullptr; // under which threading.local objects keep theirs
    PyObject* localSentinel = nullptr;
#endif
    PyObject* firstIteration = nullptr; // sys.set_asyncgen_hooks()
    PyObject* finalizer = nullptr;
    decltype(PyThreadState::coroutine_origin_tracking_depth) trackingDepth = 0; // of the origins of coroutines
  };
  struct Outside {
    Outside();
    ~Outside();
    Outside(const Outside&) = delete;
    Outside& operator=(const Outside&) = delete;

    Held held;
    PyObject* handledType; // by an `except` in which this thread is: what sys.exc_info() gives
    PyObject* handled;
    PyObject* handledTraceback;
    bool traced;
    bool profiled;
    int64_t autogradContext;
    KeptThreadState torch;
    KeptFloatControl floats;
  };

  friend class MaybeUserCode;

  static Held exchange(Held held);
  static void drop(Held& held);
  // What Python code of this thread has set ends; from now on the thread holds `next`.
  static void end(Held next, bool traced, bool profiled);

  std::optional<Outside> outside_; // if this thread worked for the engine
};

// The same for code that runs without the GIL and seldom comes to Python: a TorchScript function (torch.jit.ignore,
// operators that Python registered), a backward pass, the end of an RRef's value. Made and destroyed without the GIL,
// which it takes only where Python code has left something. UserCode within it is a UserCode of its own.
class MaybeUserCode {
 public:
  MaybeUserCode();
  ~MaybeUserCode();
  MaybeUserCode(const MaybeUserCode&) = delete;
  MaybeUserCode& operator=(const MaybeUserCode&) = delete;

 private:
  static bool somethingHeld();

  const bool engineWork_;
  std::optional<UserCode> code_; // if this thread holds something already; engine threads hold nothing between tasks
  std::optional<KeptThreadState> torch_;
  std::optional<KeptFloatControl> floats_;
};

} // namespace torch_rpc_mpi
