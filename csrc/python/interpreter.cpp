#include "python/interpreter.h"

#include <utility>

#include <cxxabi.h>
#include <unistd.h>

#include "agent/engine_work.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

std::shared_ptr<const py::object> shared(py::object object) {
  return {new py::object(std::move(object)), [](const py::object* held) {
            if (interpreterRuns()) {
              const Gil gil;
              delete held;
            }
          }};
}

namespace {

template <typename Body>
void orStay(const Body& body) {
  try {
    body();
  } catch (abi::__forced_unwind&) {
    for (;;) {
      pause();
    }
  }
}

} // namespace

Gil::Gil() {
  orStay([this] { gil_.emplace(); });
}

NoGil::~NoGil() {
  orStay([this] { PyEval_RestoreThread(state_); });
}

py::object callToTheEndOfPython(const py::object& function, const py::object& argument) {
  PyObject* result = nullptr;
  orStay([&] { result = PyObject_CallFunctionObjArgs(function.ptr(), argument.ptr(), nullptr); });
  if (result == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(result);
}

// Note [Python thread state]
// Engine threads acquire the GIL for every call that runs Python. Making and destroying a thread state each time costs
// more than the call, so each thread gets one when it starts and keeps it, without holding the GIL. What users' code
// sets in it ends with that code: see user_code.h.
void withPythonThreadState(const std::function<void()>& body) {
  PyGILState_STATE gil{};
  orStay([&] { gil = PyGILState_Ensure(); });
  PyThreadState* const state = PyEval_SaveThread();
  {
    const EngineWork work;
    body();
  }
  if (interpreterRuns()) { // otherwise the state is gone already
    orStay([&] { PyEval_RestoreThread(state); });
    PyGILState_Release(gil);
  }
}

} // namespace torch_rpc_mpi
