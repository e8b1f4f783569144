#include "agent/rref_sessions.h"

#include <torch/csrc/distributed/rpc/rref_context.h>

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// RRefContext has no function for this, and its members are private. An explicit instantiation may name them
// (C++ standard, [temp.spec.general]: the usual access checking rules do not apply to it).
template <typename Name, typename Name::Type kMember>
struct Expose {
  friend typename Name::Type memberOf(Name) {
    return kMember;
  }
};

struct AgentMember {
  using Type = const std::shared_ptr<rpc::RpcAgent> rpc::RRefContext::*;
  friend Type memberOf(AgentMember);
};
struct DestroyedMember {
  using Type = bool rpc::RRefContext::*;
  friend Type memberOf(DestroyedMember);
};
struct DestroyedMutexMember {
  using Type = std::mutex rpc::RRefContext::*;
  friend Type memberOf(DestroyedMutexMember);
};

template struct Expose<AgentMember, &rpc::RRefContext::agent_>;
template struct Expose<DestroyedMember, &rpc::RRefContext::destroyed_>;
template struct Expose<DestroyedMutexMember, &rpc::RRefContext::destroyedMutex_>;

} // namespace

void adoptRRefContext(const std::shared_ptr<rpc::RpcAgent>& agent) {
  auto& context = rpc::RRefContext::getInstance(); // the first time, it takes torch's current agent
  if (context.agent() == agent) {
    return;
  }
  std::shared_ptr<rpc::RpcAgent> old; // let go of outside the lock
  const std::lock_guard<std::mutex> lock(context.*memberOf(DestroyedMutexMember()));
  old = std::exchange(const_cast<std::shared_ptr<rpc::RpcAgent>&>(context.*memberOf(AgentMember())), agent);
  context.*memberOf(DestroyedMember()) = false;
}

} // namespace torch_rpc_mpi
