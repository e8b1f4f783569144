// How a call of a Python function is pickled again, by value, if its callee lacks a name of __main__.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/distributed/rpc/types.h>
#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

// Copied and destroyed without the GIL, which a small call that succeeds must not have to wait for.
class ByValue {
 public:
  // The call is not sent again.
  ByValue() = default;
  // how: None; True to let torch_rpc_mpi._pickler.again() do it, given the first attempt's pickle and tensors, of which
  // this keeps copies; or a function without arguments that does it. With the GIL or without.
  ByValue(const pybind11::object& how, const std::string& pickled, const std::vector<at::Tensor>& tensors);
  // As with True.
  ByValue(const std::string& pickled, const std::vector<at::Tensor>& tensors);

  bool possible() const {
    return function_ != nullptr || first_ != nullptr;
  }
  // Takes the GIL. Throws std::runtime_error with the text of the Python exception.
  torch::distributed::rpc::SerializedPyObj pickle() const;

 private:
  struct First {
    std::string pickled;
    std::vector<at::Tensor> tensors;
  };
  std::shared_ptr<const pybind11::object> function_;
  std::shared_ptr<const First> first_;
};

} // namespace torch_rpc_mpi
