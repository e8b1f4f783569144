#pragma once

#include <torch/csrc/distributed/rpc/types.h>

namespace torch_rpc_mpi {

// Lets distributed autograd begin another session of this process with worker id `id`.
//
// torch keeps the first session's worker id, from which it makes the ids of contexts and messages, and refuses another.
// Where no context is alive in this process, none of its own needs those ids any more, and torch may choose again. Call
// before torch's own initialisation.
void forgetAutogradWorkerId(torch::distributed::rpc::worker_id_t id);

} // namespace torch_rpc_mpi
