// What other workers hold of this one's, for the day on which one of them is lost.
#pragma once

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <torch/csrc/distributed/rpc/types.h>

#include "codec/rpc_message.h"

namespace torch_rpc_mpi {

// Note [What the lost held]
// ~~~~~~~~~~~~~~~~~~~~~~~~~
// An owner keeps a value until the workers that hold forks of its RRef have said that they need it no longer, a user
// keeps its RRef until the worker that it has passed it to has taken it up, and contexts of distributed autograd live
// until the worker that opened them closes them. A worker that is lost says none of that, so the others say it to
// themselves in its name: they run the messages that it would have sent. Some time later than they lose it, because
// what it had sent before may still be waiting for a thread.
//
// The id of a fork tells who made it: a remote() its caller, who holds it as well; otherwise the worker that passed the
// RRef on, and the holder is who got it. This one is known here of what is passed on from here, and of what the holder
// has asked the owner for. It is not known of RRefs among the arguments of TorchScript functions.

// Thread-safe: mutex_ guards holders_, of which size_ is a hint.
class HeldByPeers {
 public:
  using ForkId = torch::distributed::rpc::ForkId;

  // Forks that this thread has made; they are in what it sends next.
  static void made(std::vector<ForkId> forks);
  // This thread sends.
  void sends(int peer);
  // A message of torch's own protocol of RRefs, that is to be run here.
  void arrived(int peer, const torch::distributed::rpc::Message& message);

  // The messages that the peer would have sent, if the agent of this worker is torch's.
  std::vector<RpcMessage> lastMessagesOf(int peer) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<ForkId, int, ForkId::Hash> holders_;
  std::atomic<size_t> size_{0};
};

} // namespace torch_rpc_mpi
