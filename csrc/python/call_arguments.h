// What a call of an operator or TorchScript function takes along, and what it returns.
#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/stack.h>

namespace torch_rpc_mpi {

// Throws pybind11::type_error that names the argument and its type, if there is a tensor in it that cannot be sent.
// `positional`: how many of the arguments on the stack were not given by name. With the GIL.
void checkArguments(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t positional);

// Throws std::runtime_error that names the part of the result and its type, if that is a tensor that cannot be sent.
// Takes the GIL for that alone.
void checkResult(const c10::IValue& result);

} // namespace torch_rpc_mpi
