// Which overload of a builtin operator a call from Python means.
#pragma once

#include <memory>
#include <string>

#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/csrc/utils/pybind.h>

#include "python/script_messages.h"

namespace torch_rpc_mpi {

struct BuiltinCall {
  std::shared_ptr<torch::jit::Operator> op;
  torch::jit::Stack stack;
  std::shared_ptr<const BuiltinName> name;
};

// Note [Matching builtin operators]
// torch takes the first overload that the arguments can be converted for, and learns that one cannot be from an
// exception, whose text renders every argument. Most overloads that do not match are plain from the Python types alone,
// so those are left out beforehand, and the rest is remembered by the types of the call. Only what no value of a type
// could satisfy is left out: the remaining overloads are tried as torch tries them, so the outcome is torch's also for
// arguments whose value decides (a tensor of one element where a number is wanted), and a failure has torch's text.
//
// With the GIL, which also guards what is remembered.
BuiltinCall matchBuiltin(const std::string& opName, const pybind11::args& args, const pybind11::kwargs& kwargs);

// The same without leaving anything out: what matchBuiltin() is tested against.
BuiltinCall matchBuiltinAmongAll(const std::string& opName, const pybind11::args& args, const pybind11::kwargs& kwargs);

} // namespace torch_rpc_mpi
