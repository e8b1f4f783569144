// What torch's RRefContext keeps for other workers. It has no function that lists it; the members have these names and
// types in torch 2.6 to 2.14.
#pragma once

#include <utility>
#include <vector>

#include <torch/csrc/distributed/rpc/types.h>

namespace torch_rpc_mpi::torch_compat {

struct RRefTables {
  using RRefId = torch::distributed::rpc::RRefId;
  using ForkId = torch::distributed::rpc::ForkId;
  std::vector<std::pair<RRefId, ForkId>> forksOfOwners; // of values of this worker
  std::vector<ForkId> pendingChildren;                  // passed on, and not taken up yet
};

// A copy, as of now. While torch has an agent.
RRefTables rrefTables();

} // namespace torch_rpc_mpi::torch_compat
