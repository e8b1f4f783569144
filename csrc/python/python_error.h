// Exceptions of Python as exceptions of C++.
//
// Note [Exceptions of Python in futures]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// The error of a future is rethrown by whoever asks for its value: by any thread, any number of times, with the GIL or
// without, and into Python or not. Neither pybind11's error_already_set nor torch's python_error can stand that. What
// can is a PythonError: type and text of the exception, and a text of its own for those who know only std::exception.
// Where it reaches Python, a new exception is made. That is done by a translator of pybind11's, which all modules of a
// process share, so that torch's Future.wait() and PyRRef.to_here() raise the type as well.
#pragma once

#include <memory>
#include <stdexcept>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

class PythonError final : public std::runtime_error {
 public:
  // With the GIL, like all others but copying, what() and destruction. `remote`: a RemoteException of
  // torch.distributed.rpc.internal.
  explicit PythonError(pybind11::object remote);
  // What was thrown while Python ran here.
  static PythonError of(const pybind11::error_already_set& error);
  static PythonError of(const python_error& error);

  const pybind11::object& remote() const {
    return *remote_;
  }
  // Sets Python's error indicator to a new exception of the type and with the text.
  void restore() const;

 private:
  std::shared_ptr<const pybind11::object> remote_;
};

// Once, when the module is loaded: the translator, and the texts of exceptions of Python for errorText().
void translatePythonErrors();

} // namespace torch_rpc_mpi
