#include "python/repeatable_call.h"

#include <utility>

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/distributed/autograd/context/container.h>
#include <torch/csrc/distributed/autograd/rpc_messages/rpc_with_autograd.h>

#include "agent/caller.h"
#include "torch_compat/autograd.h"
#include "torch_compat/profiler.h"

namespace torch_rpc_mpi {

namespace autograd = torch::distributed::autograd;
namespace rpc = torch::distributed::rpc;

namespace {

// A scope in which this thread is in no context of distributed autograd.
class NoContext {
 public:
  NoContext() {
    autograd::DistAutogradContainer::forceCurrentContextId(-1);
  }
  ~NoContext() {
    autograd::DistAutogradContainer::forceCurrentContextId(before_);
  }
  NoContext(const NoContext&) = delete;
  NoContext& operator=(const NoContext&) = delete;

 private:
  const int64_t before_ = autograd::DistAutogradContainer::currentContextId();
};

// Null if it has been released.
autograd::ContextPtr contextOf(const autograd::AutogradMetadata& metadata) {
  try {
    return autograd::DistAutogradContainer::getInstance().retrieveContext(metadata.autogradContextId);
  } catch (const c10::Error&) {
    return nullptr;
  }
}

// Leads a send function to the gradients of these tensors, as addSendRpcBackward() does with the one that it makes.
void redirect(autograd::SendRpcBackward& function, const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> differentiable;
  std::copy_if(tensors.begin(), tensors.end(), std::back_inserter(differentiable), [](const at::Tensor& tensor) {
    return tensor.requires_grad();
  });
  function.set_next_edges(torch::autograd::collect_next_edges(differentiable));
  function.clear_input_metadata();
  for (const at::Tensor& tensor : differentiable) {
    function.add_input_metadata(tensor);
  }
}

} // namespace

RepeatableCall::RepeatableCall(WorkerInfo dst, float rpcTimeoutSeconds)
    : dst_(std::move(dst)),
      rpcTimeoutSeconds_(rpcTimeoutSeconds) {
  auto& contexts = autograd::DistAutogradContainer::getInstance();
  if (contexts.hasValidContext()) {
    recordedAs_.emplace(autograd::DistAutogradContainer::currentContextId(), contexts.newAutogradMessageId());
  }
  auto& profiler = rpc::RemoteProfilerManager::getInstance();
  if (profiler.isCurrentKeySet()) {
    profilingKey_ = profiler.getCurrentProfilingKey();
  }
}

JitFuturePtr RepeatableCall::send(RpcMessage message) {
  const bool again = std::exchange(sent_, true);
  if (recordedAs_) {
    message = record(std::move(message), again);
  }
  if (again && profilingKey_) {
    rpc::RemoteProfilerManager::getInstance().setCurrentKey(*profilingKey_);
  }
  // What is left for this to add is the profiler's part. The thread that sends again may be in a context of its own.
  const NoContext recordedAlready;
  std::optional<Caller::SecondAttempt> secondAttempt;
  if (again) {
    secondAttempt.emplace();
  }
  return autograd::sendMessageWithAutograd(
      *rpc::RpcAgent::getCurrentRpcAgent(), dst_, std::move(message), /*forceGradRecording=*/false, rpcTimeoutSeconds_);
}

// What torch's getMessageWithAutograd() does with a call of a Python function. It is recorded even if no argument is a
// tensor: the result may be one.
RpcMessage RepeatableCall::record(RpcMessage message, bool again) const {
  const autograd::ContextPtr context = contextOf(*recordedAs_);
  if (context == nullptr) {
    return message; // there will be no backward pass
  }
  const auto agent = rpc::RpcAgent::getCurrentRpcAgent();
  autograd::RpcWithAutograd call(
      agent->getWorkerInfo().id_, rpc::MessageType::FORWARD_AUTOGRAD_REQ, *recordedAs_, std::move(message),
      agent->getDeviceMap(dst_));
  const auto sent = again ? context->sendFunctions() : decltype(context->sendFunctions()){};
  const auto first = sent.find(recordedAs_->autogradMessageId);
  if (first != sent.end()) {
    redirect(*first->second, call.tensors());
  } else if (torch::autograd::compute_requires_grad(call.tensors())) {
    autograd::addSendRpcBackward(context, *recordedAs_, call.tensors());
  }
  context->addKnownWorkerId(dst_.id_);
  return std::move(call).toMessage();
}

} // namespace torch_rpc_mpi
