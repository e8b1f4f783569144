// Runs the Python functions that peers call, and pickles what they return.
#pragma once

#include <torch/csrc/distributed/rpc/types.h>
#include <torch/csrc/utils/pybind.h>

#include "agent/call_table.h"
#include "python/pickle/plain_pickle.h"

namespace torch_rpc_mpi {

// The session's Python functions, and its pickler of plain values. Immutable. Who calls run(), or serialize() with a
// Python object, holds the GIL.
class FunctionRunner {
 public:
  // As for PythonRequestCallback.
  FunctionRunner(
      pybind11::object runFunction,
      pybind11::object serialize,
      pybind11::object passOn,
      pybind11::object plainPickler);
  ~FunctionRunner();
  FunctionRunner(const FunctionRunner&) = delete;
  FunctionRunner& operator=(const FunctionRunner&) = delete;

  pybind11::object run(pybind11::object function) const;
  torch::distributed::rpc::SerializedPyObj serialize(const pybind11::object& result) const;
  // Its value, or its error if that is an exception of Python (which another worker sent). Takes the GIL.
  torch::distributed::rpc::SerializedPyObj serialize(c10::ivalue::Future& future) const;

  const PlainPickler* plainPickler() const { // null: none
    return plainPickler_;
  }

 private:
  pybind11::object runFunction_;
  pybind11::object serialize_;
  pybind11::object passOn_;
  pybind11::object plainPicklerObject_;
  const PlainPickler* const plainPickler_; // of that object, or null
};

} // namespace torch_rpc_mpi
