// What a call of an operator or TorchScript function takes along.
#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/stack.h>

namespace torch_rpc_mpi {

// Throws pybind11::type_error that names the argument and its type, if there is a tensor in it that cannot be sent.
// `positional`: how many of the arguments on the stack were not given by name. With the GIL.
void checkArguments(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t positional);

} // namespace torch_rpc_mpi
