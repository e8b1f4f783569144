#include "agent/held_by_peers.h"

#include <utility>

#include <torch/csrc/distributed/autograd/rpc_messages/cleanup_autograd_context_req.h>
#include <torch/csrc/distributed/rpc/rpc_agent.h>
#include <torch/csrc/distributed/rpc/rref_proto.h>

#include "agent/autograd_sessions.h"
#include "torch_compat/rref_tables.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

thread_local std::vector<rpc::ForkId> justMade;

} // namespace

void HeldByPeers::made(std::vector<ForkId> forks) {
  justMade = std::move(forks);
}

void HeldByPeers::sends(int peer) {
  if (justMade.empty()) {
    return;
  }
  const auto forks = std::exchange(justMade, {});
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const ForkId& fork : forks) {
    holders_.insert_or_assign(fork, peer);
  }
  size_ = holders_.size();
}

void HeldByPeers::arrived(int peer, const rpc::Message& message) {
  const auto forget = [this](const ForkId& fork) {
    const std::lock_guard<std::mutex> lock(mutex_);
    holders_.erase(fork);
    size_ = holders_.size();
  };
  switch (message.type()) {
    case rpc::MessageType::RREF_FORK_REQUEST: {
      const ForkId fork = rpc::RRefForkRequest::fromMessage(message)->forkId();
      const std::lock_guard<std::mutex> lock(mutex_);
      holders_.insert_or_assign(fork, peer);
      size_ = holders_.size();
      break;
    }
    case rpc::MessageType::RREF_USER_DELETE:
      if (size_ > 0) {
        forget(rpc::RRefUserDelete::fromMessage(message)->forkId());
      }
      break;
    case rpc::MessageType::RREF_CHILD_ACCEPT:
      if (size_ > 0) {
        forget(rpc::RRefChildAccept::fromMessage(message)->forkId());
      }
      break;
    default:
      break;
  }
}

std::vector<RpcMessage> HeldByPeers::lastMessagesOf(int peer) const {
  std::vector<RpcMessage> messages;
  if (!rpc::RpcAgent::isCurrentRpcAgentSet()) {
    return messages;
  }
  const auto tables = torch_compat::rrefTables();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [rref, fork] : tables.forksOfOwners) {
    const auto holder = holders_.find(fork);
    if (holder == holders_.end() ? fork.createdOn_ == peer : holder->second == peer) {
      messages.push_back(rpc::RRefUserDelete(rref, fork).toMessage());
    }
  }
  for (const ForkId& fork : tables.pendingChildren) {
    const auto holder = holders_.find(fork);
    if (holder != holders_.end() && holder->second == peer) {
      messages.push_back(rpc::RRefChildAccept(fork).toMessage());
    }
  }
  for (const int64_t context : autogradContextsOf(static_cast<rpc::worker_id_t>(peer))) {
    messages.push_back(torch::distributed::autograd::CleanupAutogradContextReq(context).toMessage());
  }
  return messages;
}

} // namespace torch_rpc_mpi
