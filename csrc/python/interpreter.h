// Whether there is a Python to run anything in.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/pythoncapi_compat.h>

namespace torch_rpc_mpi {

// Whether the GIL may be asked for: not before the interpreter is there, nor once it ends.
inline bool interpreterRuns() {
  return Py_IsInitialized() != 0 && Py_IsFinalizing() == 0;
}

// For threads without the GIL to copy and let go of. What is let go of once the interpreter ends stays for ever. With
// the GIL.
std::shared_ptr<const pybind11::object> shared(pybind11::object object);

// Note [Threads that outlive Python]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A process may leave while a function that a peer called, or a callback, is still running, or while a daemon thread of
// the user's waits for an answer. Until version 3.14, Python ends such a thread when it next asks for the GIL: the
// stack is unwound as if by an exception, through functions and destructors that throw nothing, which ends the process,
// or that use an interpreter that is gone. What follows catches the unwinding in the innermost frame that is ours, and
// keeps the thread where it is until the process has ended, as Python 3.14 does. It stands wherever the GIL is taken.

// As pybind11::gil_scoped_acquire.
class Gil {
 public:
  Gil();

 private:
  std::optional<pybind11::gil_scoped_acquire> gil_;
};

// As pybind11::gil_scoped_release.
class NoGil {
 public:
  NoGil() : state_(PyEval_SaveThread()) {}
  ~NoGil();
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;

 private:
  PyThreadState* const state_;
};

// With the GIL.
pybind11::object callToTheEndOfPython(const pybind11::object& function, const pybind11::object& argument);

// Runs `body`, an engine thread's life, with a Python thread state but without the GIL.
void withPythonThreadState(const std::function<void()>& body);

} // namespace torch_rpc_mpi
