#include "agent/autograd_sessions.h"

#include <torch/csrc/distributed/autograd/context/container.h>

namespace torch_rpc_mpi {

namespace autograd = torch::distributed::autograd;

namespace {

using torch::distributed::rpc::worker_id_t;

constexpr int kWorkerShift = 48; // of the worker's id in that of a context

// Private members, named by an explicit instantiation as in rref_sessions.cpp.
struct Functions {
  void (*forget)(worker_id_t id);
  std::vector<int64_t> (*contextsOf)(worker_id_t id);
};
Functions functions();

template <auto kInstance, auto kInitialized, auto kWorkerId, auto kShards>
struct Private {
  static void forget(worker_id_t id) {
    autograd::DistAutogradContainer& container = kInstance();
    if (!(container.*kInitialized) || container.*kWorkerId == id) {
      return;
    }
    for (auto& shard : container.*kShards) {
      std::vector<autograd::ContextPtr> dropped; // outside the lock
      const std::lock_guard<std::mutex> lock(shard.lock);
      std::erase_if(shard.contexts, [&](auto& context) {
        if (context.first >> kWorkerShift == container.*kWorkerId) {
          return false;
        }
        dropped.push_back(std::move(context.second));
        return true;
      });
    }
    if (container.numAutogradContexts() == 0) {
      container.*kInitialized = false;
    }
  }

  static std::vector<int64_t> contextsOf(worker_id_t id) {
    autograd::DistAutogradContainer& container = kInstance();
    std::vector<int64_t> found;
    for (auto& shard : container.*kShards) {
      const std::lock_guard<std::mutex> lock(shard.lock);
      for (const auto& context : shard.contexts) {
        if (context.first >> kWorkerShift == id) {
          found.push_back(context.first);
        }
      }
    }
    return found;
  }

  friend Functions functions() {
    return {&forget, &contextsOf};
  }
};

template struct Private<
    &autograd::DistAutogradContainer::getInstanceInternal,
    &autograd::DistAutogradContainer::initialized_,
    &autograd::DistAutogradContainer::worker_id_,
    &autograd::DistAutogradContainer::autograd_contexts_>;

} // namespace

void forgetAutogradWorkerId(worker_id_t id) {
  functions().forget(id);
}

std::vector<int64_t> autogradContextsOf(worker_id_t id) {
  return functions().contextsOf(id);
}

} // namespace torch_rpc_mpi
