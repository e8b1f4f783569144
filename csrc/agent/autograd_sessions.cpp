#include "agent/autograd_sessions.h"

#include <torch/csrc/distributed/autograd/context/container.h>

namespace torch_rpc_mpi {

namespace autograd = torch::distributed::autograd;

namespace {

// Private members, named by an explicit instantiation as in rref_sessions.cpp.
using ForgetFunction = void (*)(torch::distributed::rpc::worker_id_t id);
ForgetFunction forgetFunction();

template <auto kInstance, auto kInitialized, auto kWorkerId>
struct Forget {
  static void forget(torch::distributed::rpc::worker_id_t id) {
    autograd::DistAutogradContainer& container = kInstance();
    if (container.*kInitialized && container.*kWorkerId != id && container.numAutogradContexts() == 0) {
      container.*kInitialized = false;
    }
  }
  friend ForgetFunction forgetFunction() {
    return &forget;
  }
};

template struct Forget<
    &autograd::DistAutogradContainer::getInstanceInternal,
    &autograd::DistAutogradContainer::initialized_,
    &autograd::DistAutogradContainer::worker_id_>;

} // namespace

void forgetAutogradWorkerId(torch::distributed::rpc::worker_id_t id) {
  forgetFunction()(id);
}

} // namespace torch_rpc_mpi
