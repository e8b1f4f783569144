#include "torch_compat/rref_tables.h"

#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include <torch/csrc/distributed/rpc/rref_context.h>

#include "torch_compat/private_member.h"

namespace torch_rpc_mpi::torch_compat {

namespace rpc = torch::distributed::rpc;

struct RRefMutex {
  using type = std::mutex rpc::RRefContext::*;
  friend type memberOf(RRefMutex);
};
template struct GrantMember<RRefMutex, &rpc::RRefContext::mutex_>;

struct RRefForks {
  using Forks = std::unordered_set<rpc::ForkId, rpc::ForkId::Hash>;
  using type = std::unordered_map<rpc::RRefId, Forks, rpc::RRefId::Hash> rpc::RRefContext::*;
  friend type memberOf(RRefForks);
};
template struct GrantMember<RRefForks, &rpc::RRefContext::forks_>;

struct RRefPendingChildren {
  using type = std::unordered_map<rpc::ForkId, c10::intrusive_ptr<rpc::RRef>, rpc::ForkId::Hash> rpc::RRefContext::*;
  friend type memberOf(RRefPendingChildren);
};
template struct GrantMember<RRefPendingChildren, &rpc::RRefContext::pendingChildren_>;

RRefTables rrefTables() {
  auto& context = rpc::RRefContext::getInstance();
  RRefTables tables;
  const std::lock_guard<std::mutex> lock(context.*memberOf(RRefMutex()));
  for (const auto& [rref, forks] : context.*memberOf(RRefForks())) {
    for (const auto& fork : forks) {
      tables.forksOfOwners.emplace_back(rref, fork);
    }
  }
  for (const auto& [fork, rref] : context.*memberOf(RRefPendingChildren())) {
    tables.pendingChildren.push_back(fork);
  }
  return tables;
}

} // namespace torch_rpc_mpi::torch_compat
