#include "python/futures_module.h"

#include <memory>

#include <torch/csrc/jit/python/pybind_utils.h>

#include "python/interpreter.h"
#include "python/user_code.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

using torch::jit::PythonFunctionGuard;
using PyFuture = std::shared_ptr<torch::jit::PythonFutureWrapper>;

// Runs a callback of Python's. What it raises is thrown as a C++ exception, which needs no GIL to be let go of.
c10::IValue call(const PythonFunctionGuard& callback, const PyFuture& future) {
  const Gil gil;
  const UserCode code;
  try {
    return torch::jit::toIValue(callToTheEndOfPython(callback.func_, py::cast(future)), c10::PyObjectType::get());
  } catch (const py::error_already_set& error) {
    throw std::runtime_error(error.what());
  }
}

// As torch's, but that the callback is a UserCode.
PyFuture then(const PyFuture& self, py::function callback) {
  auto guarded = std::make_shared<PythonFunctionGuard>(std::move(callback));
  const NoGil noGil; // a complete future runs it here and now
  auto child = self->fut->then(
      [self, guarded = std::move(guarded)](c10::ivalue::Future& /*completed*/) {
        try {
          return call(*guarded, self);
        } catch (const std::exception& error) {
          // As torch words it: programs may look for that.
          throw std::runtime_error(c10::str("Got the following error when running the callback: ", error.what()));
        }
      },
      c10::PyObjectType::get());
  return std::make_shared<torch::jit::PythonFutureWrapper>(std::move(child));
}

void addDoneCallback(const PyFuture& self, py::function callback) {
  auto guarded = std::make_shared<PythonFunctionGuard>(std::move(callback));
  const NoGil noGil;
  self->fut->addCallback([self, guarded = std::move(guarded)](c10::ivalue::Future& /*completed*/) {
    try {
      call(*guarded, self);
    } catch (const std::exception& error) {
      LOG(ERROR) << "Got the following error when running the callback: " << error.what();
    }
  });
}

} // namespace

void bindFutures(py::module_& module) {
  const py::object future = py::module_::import("torch._C").attr("Future");
  const auto method = [&](const char* name, auto function) {
    return py::cpp_function(function, py::name(name), py::is_method(future), py::scope(future));
  };
  module.attr("future_then") = method("then", &then);
  module.attr("future_add_done_callback") = method("add_done_callback", &addDoneCallback);
}

} // namespace torch_rpc_mpi
