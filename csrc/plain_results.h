// The commonest results of Python functions, None and one tensor, have pickles that are always the same. Known by
// heart, these need no Python, and so no GIL, for which the threads of a busy caller would queue.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/distributed/rpc/types.h>

namespace torch_rpc_mpi {

// The pickle of None.
const std::string& pickledNone();

// The pickle of a tensor that is the only one of its message, as torch_rpc_mpi._pickler sends it.
const std::string& pickledTensor();

// The value, if it is None or a tensor as torch_rpc_mpi._pickler sends it.
std::optional<c10::IValue> plainResult(const torch::distributed::rpc::SerializedPyObj& result);

} // namespace torch_rpc_mpi
