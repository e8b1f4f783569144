#include "python/interpreter.h"

#include <utility>

#include <cxxabi.h>
#include <unistd.h>

namespace py = pybind11;

namespace torch_rpc_mpi {

std::shared_ptr<const py::object> shared(py::object object) {
  return {new py::object(std::move(object)), [](const py::object* held) {
            if (interpreterRuns()) {
              const py::gil_scoped_acquire gil;
              delete held;
            }
          }};
}

py::object callToTheEndOfPython(const py::object& function, const py::object& argument) {
  PyObject* result = nullptr;
  try {
    result = PyObject_CallFunctionObjArgs(function.ptr(), argument.ptr(), nullptr);
  } catch (abi::__forced_unwind&) {
    for (;;) {
      pause();
    }
  }
  if (result == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(result);
}

} // namespace torch_rpc_mpi
