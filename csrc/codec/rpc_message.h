// What the agent sends and receives: torch's messages.
#pragma once

#include <torch/csrc/distributed/rpc/message.h>

namespace torch_rpc_mpi {

using RpcMessage = c10::intrusive_ptr<torch::distributed::rpc::Message>;

} // namespace torch_rpc_mpi
