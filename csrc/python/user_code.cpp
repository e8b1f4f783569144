#include "python/user_code.h"

#include <atomic>
#include <utility>

#include <torch/csrc/distributed/autograd/context/container.h>
#include <torch/csrc/utils/pybind.h>

#include "agent/engine_work.h"
#include "engine/thread_attributes.h"
#include "python/interpreter.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

using torch::distributed::autograd::DistAutogradContainer;

// Python counts its own up from 0.
uint64_t newThreadId() {
  static std::atomic<uint64_t> last{uint64_t{1} << 62};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

} // namespace

UserCode::UserCode() {
  if (EngineWork::underWay()) {
    outside_.emplace();
    EngineWork::underWay() = false;
  }
}

UserCode::~UserCode() {
  if (outside_.has_value()) {
    outside_.reset();
    EngineWork::underWay() = true;
  }
}

// Puts `held` into this thread's state, and returns what was there.
UserCode::Held UserCode::exchange(Held held) {
  PyThreadState* const thread = PyThreadState_Get();
  std::swap(thread->id, held.id);
  std::swap(thread->context_ver, held.contextVersion);
  std::swap(thread->dict, held.values);
  std::swap(thread->context, held.context);
#if PY_VERSION_HEX >= 0x030D0000
  std::swap(thread->threading_local_key, held.localKey);
  std::swap(thread->threading_local_sentinel, held.localSentinel);
#endif
  std::swap(thread->async_gen_firstiter, held.firstIteration);
  std::swap(thread->async_gen_finalizer, held.finalizer);
  std::swap(thread->coroutine_origin_tracking_depth, held.trackingDepth);
  return held;
}

// In the order in which Python clears a thread's state.
void UserCode::drop(Held& held) {
  Py_CLEAR(held.values);
#if PY_VERSION_HEX >= 0x030D0000
  Py_CLEAR(held.localKey);
  Py_CLEAR(held.localSentinel);
#endif
  Py_CLEAR(held.firstIteration);
  Py_CLEAR(held.finalizer);
  Py_CLEAR(held.context);
}

UserCode::Outside::Outside()
    : traced(PyThreadState_Get()->c_tracefunc != nullptr),
      profiled(PyThreadState_Get()->c_profilefunc != nullptr),
      autogradContext(DistAutogradContainer::currentContextId()) {
  ThreadAttributes::runs(); // it may start processes
  PyErr_GetExcInfo(&handledType, &handled, &handledTraceback);
  PyErr_SetExcInfo(nullptr, nullptr, nullptr);
  held.id = newThreadId();
  held = exchange(held);
}

UserCode::Outside::~Outside() {
  if (!interpreterRuns()) { // there is no Python left to put anything back into
    return;
  }
  DistAutogradContainer::forceCurrentContextId(autogradContext);
  end(held, traced, profiled);
  PyErr_SetExcInfo(handledType, handled, handledTraceback);
}

void UserCode::end(Held next, bool traced, bool profiled) {
  const py::error_scope raised; // an exception may be on its way, and the values may have destructors
  if (!traced && PyThreadState_Get()->c_tracefunc != nullptr) {
    PyEval_SetTrace(nullptr, nullptr);
  }
  if (!profiled && PyThreadState_Get()->c_profilefunc != nullptr) {
    PyEval_SetProfile(nullptr, nullptr);
  }
  Held inside = exchange(Held{newThreadId()});
  drop(inside);
  inside = exchange(next); // what the destructors set
  drop(inside);
}

MaybeUserCode::MaybeUserCode() : engineWork_(EngineWork::underWay()) {
  if (!engineWork_) {
    return;
  }
  if (somethingHeld() && interpreterRuns()) {
    const Gil gil;
    code_.emplace();
  } else {
    torch_.emplace();
    floats_.emplace();
  }
}

MaybeUserCode::~MaybeUserCode() {
  if (!engineWork_ || !interpreterRuns()) {
    return;
  }
  if (code_.has_value()) {
    const Gil gil;
    code_.reset();
  } else if (somethingHeld()) {
    const Gil gil;
    UserCode::end(UserCode::Held{newThreadId()}, /*traced=*/false, /*profiled=*/false);
  }
}

// A thread's own state, which no other thread changes: to look at it takes no GIL.
bool MaybeUserCode::somethingHeld() {
  const PyThreadState* const thread = PyGILState_GetThisThreadState();
  if (thread == nullptr) {
    return false;
  }
#if PY_VERSION_HEX >= 0x030D0000
  const bool locals = thread->threading_local_key != nullptr || thread->threading_local_sentinel != nullptr;
#else
  const bool locals = false;
#endif
  return locals || thread->dict != nullptr || thread->context != nullptr || thread->async_gen_firstiter != nullptr ||
      thread->async_gen_finalizer != nullptr || thread->coroutine_origin_tracking_depth != 0 ||
      thread->c_tracefunc != nullptr || thread->c_profilefunc != nullptr;
}

} // namespace torch_rpc_mpi
