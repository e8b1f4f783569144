#pragma once

#include <memory>

#include <torch/csrc/distributed/rpc/rpc_agent.h>

namespace torch_rpc_mpi {

// Makes RRefs of torch work in this session as they did in the process's first.
//
// torch's RRefContext is made for one session: it keeps the first agent for good, and once destroyed it sends no
// RREF_USER_DELETE any more, so that later sessions leak and their graceful shutdown waits in vain. This hands it the
// current agent and revives it. Call when `agent` is torch's current one and has not started.
void adoptRRefContext(const std::shared_ptr<torch::distributed::rpc::RpcAgent>& agent);

// For a session that ends without torch's shutdown: RRefs that live longer tell nobody of their end. Each would
// complain, with its stack, that RPC has ended.
void silenceRRefs();

} // namespace torch_rpc_mpi
