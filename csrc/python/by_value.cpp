#include "python/by_value.h"

#include <stdexcept>
#include <utility>

#include <pybind11/stl.h>

#include "python/interpreter.h"
#include "python/user_code.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

ByValue::ByValue(const py::object& how, const std::string& pickled, const std::vector<at::Tensor>& tensors) {
  if (how.is_none()) {
    return;
  }
  if (how.ptr() == Py_True) {
    first_ = std::make_shared<const First>(First{pickled, tensors});
    return;
  }
  const Gil gil;
  function_ = shared(how);
}

ByValue::ByValue(const std::string& pickled, const std::vector<at::Tensor>& tensors)
    : first_(std::make_shared<const First>(First{pickled, tensors})) {}

torch::distributed::rpc::SerializedPyObj ByValue::pickle() const {
  const Gil gil;
  const UserCode code;
  try {
    const py::object again = function_ != nullptr
        ? (*function_)()
        : py::module_::import("torch_rpc_mpi._pickler").attr("again")(py::bytes(first_->pickled), first_->tensors);
    using Pickled = std::pair<std::string, std::vector<at::Tensor>>;
    auto [pickled, tensors] = again.cast<Pickled>();
    return {std::move(pickled), std::move(tensors)};
  } catch (const py::error_already_set& error) {
    throw std::runtime_error(error.what());
  }
}

} // namespace torch_rpc_mpi
