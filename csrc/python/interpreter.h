// Whether there is a Python to run anything in.
#pragma once

#include <memory>

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

// Note [Functions that outlive Python]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A process may leave while a function that a peer called, or a callback, is still running. Until version 3.14, Python
// ends such a thread when it next asks for the GIL: the stack is unwound as if by an exception, through destructors
// that then use an interpreter that is gone, and the process crashes. This frame, the innermost that is ours, catches
// the unwinding and keeps the thread where it is until the process has ended, as Python 3.14 does.
pybind11::object callToTheEndOfPython(const pybind11::object& function, const pybind11::object& argument);

} // namespace torch_rpc_mpi
