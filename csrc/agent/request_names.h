// What torch calls the types of its requests.
#pragma once

#include <span>
#include <utility>

#include <torch/csrc/distributed/rpc/message.h>

namespace torch_rpc_mpi {

using RequestName = std::pair<const char*, torch::distributed::rpc::MessageType>;

// Those whose faults a test can ask for: see faults.h.
std::span<const RequestName> faultableRequests();

// Empty for what is no request.
const char* nameOfRequest(torch::distributed::rpc::MessageType type);

} // namespace torch_rpc_mpi
