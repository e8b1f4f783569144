#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/distributed/rpc/types.h>

namespace torch_rpc_mpi {

// Lets distributed autograd begin another session of this process with worker id `id`.
//
// torch keeps the first session's worker id, from which it makes the ids of contexts and messages, and refuses another.
// Where no context of this worker is alive, none needs those ids any more, and torch may choose again. Contexts that
// other workers have opened are of a session that is over, and dropped. Call before torch's own initialisation.
void forgetAutogradWorkerId(torch::distributed::rpc::worker_id_t id);

// The contexts here that another worker has opened, by their ids.
std::vector<int64_t> autogradContextsOf(torch::distributed::rpc::worker_id_t id);

} // namespace torch_rpc_mpi
