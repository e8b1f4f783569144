// What the entry points use of torch's distributed autograd and of its calls of TorchScript functions.
#pragma once

#if __has_include(<torch/csrc/distributed/autograd/utils.h>)
#include <torch/csrc/distributed/autograd/utils.h>
#include <torch/csrc/distributed/rpc/torchscript_functions.h>
#else
#include <torch/csrc/distributed/autograd/context/context.h>
#include <torch/csrc/distributed/autograd/rpc_messages/autograd_metadata.h>
#include <torch/csrc/distributed/rpc/rref_impl.h>
// torch 2.6 exports these functions, but leaves out the first header, which the second includes.
namespace torch::distributed {
namespace autograd {
TORCH_API void addSendRpcBackward(
    const ContextPtr& autogradContext,
    const AutogradMetadata& autogradMetadata,
    std::vector<torch::Tensor>& tensors);
TORCH_API c10::intrusive_ptr<c10::ivalue::Future> sendMessageWithAutograd(
    rpc::RpcAgent& agent,
    const rpc::WorkerInfo& dst,
    c10::intrusive_ptr<rpc::Message> wrappedRpcMsg,
    bool forceGradRecording = false,
    const float rpcTimeoutSeconds = rpc::kUnsetRpcTimeout,
    bool forceDisableProfiling = false);
} // namespace autograd
namespace rpc {
TORCH_API c10::intrusive_ptr<c10::ivalue::Future> rpcTorchscript(
    const std::string& dstWorkerName,
    const c10::QualifiedName& qualifiedName,
    const c10::FunctionSchema& functionSchema,
    std::vector<c10::IValue> stack,
    const float rpcTimeoutSeconds = kUnsetRpcTimeout,
    const bool isAsyncExecution = false);
TORCH_API c10::intrusive_ptr<RRef> remoteTorchscript(
    const std::string& dstWorkerName,
    const c10::QualifiedName& qualifiedName,
    const c10::FunctionSchema& functionSchema,
    std::vector<c10::IValue>& stack,
    const float rpcTimeoutSeconds = kUnsetRpcTimeout,
    const bool isAsyncExecution = false);
} // namespace rpc
} // namespace torch::distributed
#endif
