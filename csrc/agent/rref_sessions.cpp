#include "agent/rref_sessions.h"

#include <torch/csrc/distributed/rpc/rref_context.h>

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// RRefContext has no function for this, and its members are private. An explicit instantiation may name them
// (C++ standard, [temp.spec.general]: the usual access checking rules do not apply to it): it defines adoptFunction().
using AdoptFunction = void (*)(rpc::RRefContext& context, const std::shared_ptr<rpc::RpcAgent>& agent);
AdoptFunction adoptFunction();

template <auto kAgent, auto kDestroyedMutex, auto kDestroyed, auto kMutex, auto... kContainers>
struct Adopt {
  static void adopt(rpc::RRefContext& context, const std::shared_ptr<rpc::RpcAgent>& agent) {
    {
      // What an ungraceful end left. Nobody of this session knows of it, and its graceful shutdown would wait for it.
      // Forgotten while the context counts as destroyed, so that nothing is sent to the old peers.
      std::unique_lock<std::mutex> lock(context.*kMutex);
      const auto leftOver = std::make_tuple(std::exchange(context.*kContainers, {})...);
      lock.unlock(); // their destructors call back
    }
    std::shared_ptr<rpc::RpcAgent> old; // let go of outside the lock
    const std::lock_guard<std::mutex> lock(context.*kDestroyedMutex);
    old = std::exchange(const_cast<std::shared_ptr<rpc::RpcAgent>&>(context.*kAgent), agent);
    context.*kDestroyed = false;
  }
  friend AdoptFunction adoptFunction() {
    return &adopt;
  }
};

template struct Adopt<
    &rpc::RRefContext::agent_,
    &rpc::RRefContext::destroyedMutex_,
    &rpc::RRefContext::destroyed_,
    &rpc::RRefContext::mutex_,
    &rpc::RRefContext::owners_,
    &rpc::RRefContext::pendingOwners_,
    &rpc::RRefContext::forks_,
    &rpc::RRefContext::pendingUsers_,
    &rpc::RRefContext::confirmedUsers_,
    &rpc::RRefContext::pendingChildren_>;

using SilenceFunction = void (*)(rpc::RRefContext& context);
SilenceFunction silenceFunction();

template <auto kDestroyedMutex, auto kDestroyed>
struct Silence {
  static void silence(rpc::RRefContext& context) {
    const std::lock_guard<std::mutex> lock(context.*kDestroyedMutex);
    context.*kDestroyed = true;
  }
  friend SilenceFunction silenceFunction() {
    return &silence;
  }
};

template struct Silence<&rpc::RRefContext::destroyedMutex_, &rpc::RRefContext::destroyed_>;

} // namespace

void silenceRRefs() {
  if (rpc::RpcAgent::isCurrentRpcAgentSet()) {
    silenceFunction()(rpc::RRefContext::getInstance());
  }
}

void adoptRRefContext(const std::shared_ptr<rpc::RpcAgent>& agent) {
  auto& context = rpc::RRefContext::getInstance(); // the first time, it takes torch's current agent
  if (context.agent() != agent) {
    adoptFunction()(context, agent);
  }
}

} // namespace torch_rpc_mpi
