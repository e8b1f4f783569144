#include "python/function_runner.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/jit/python/pybind_utils.h>

#include "python/interpreter.h"
#include "python/python_error.h"
#include "python/user_code.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

FunctionRunner::FunctionRunner(py::object runFunction, py::object serialize, py::object passOn, py::object plainPickler)
    : runFunction_(std::move(runFunction)),
      serialize_(std::move(serialize)),
      passOn_(std::move(passOn)),
      plainPicklerObject_(std::move(plainPickler)),
      plainPickler_(plainPicklerObject_.is_none() ? nullptr : &plainPicklerObject_.cast<const PlainPickler&>()) {}

FunctionRunner::~FunctionRunner() {
  if (interpreterRuns()) {
    const Gil gil;
    runFunction_ = py::object();
    serialize_ = py::object();
    passOn_ = py::object();
    plainPicklerObject_ = py::object();
  } else {
    runFunction_.release();
    serialize_.release();
    passOn_.release();
    plainPicklerObject_.release();
  }
}

py::object FunctionRunner::run(py::object function) const {
  const UserCode code;
  const py::object arguments = std::move(function); // they end in it, too
  return callToTheEndOfPython(runFunction_, arguments);
}

rpc::SerializedPyObj FunctionRunner::serialize(const py::object& result) const {
  if (plainPickler_ != nullptr) {
    if (auto plain = plainPickler_->dumpResult(result)) {
      return {std::move(plain->data), std::move(plain->tensors)};
    }
  }
  const UserCode code;
  auto [data, tensors] = serialize_(result).cast<std::pair<std::string, std::vector<at::Tensor>>>();
  return {std::move(data), std::move(tensors)};
}

rpc::SerializedPyObj FunctionRunner::serialize(rpc::JitFuture& future) const {
  c10::IValue value;
  std::optional<PythonError> failure;
  try {
    value = future.value();
  } catch (const PythonError& error) {
    failure = error;
  }
  const Gil gil;
  try {
    return serialize(failure ? passOn_(failure->remote()) : torch::jit::toPyObject(std::move(value)));
  } catch (const py::error_already_set& error) {
    throw std::runtime_error(error.what());
  }
}

} // namespace torch_rpc_mpi
