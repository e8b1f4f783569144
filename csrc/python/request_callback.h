// Runs the requests that arrive. torch's own, but for Python functions.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include <torch/csrc/distributed/rpc/request_callback_impl.h>

#include "agent/call_table.h"

namespace torch_rpc_mpi {

class FunctionRunner;
class MpiAgent;

// As torch's, a Python function is unpickled, run, and its result pickled. Three things differ: from the call to the
// pickled result the GIL is held once, not taken again for each step; results are pickled as the session says; and a
// function that is still running when the interpreter ends stops where it is (see Note [Threads that outlive
// Python]). Calls of builtin operators and of TorchScript functions are read in our way (see Note [Schemas in
// messages]), and what in their results cannot be sent is named. Whatever a request leaves behind in its thread ends
// with it.
//
// Any number of threads may use it: python_ never changes, agent_ is set before the first request.
class PythonRequestCallback final : public torch::distributed::rpc::RequestCallbackImpl {
 public:
  // runFunction: takes a torch.distributed.rpc.internal.PythonUDF, returns its result, or its exception as a
  // RemoteException; as torch.distributed.rpc.internal._run_function.
  // serialize: takes a result, returns its bytes and its tensors; as torch.distributed.rpc.internal.serialize.
  // passOn: takes a RemoteException that another worker sent, returns the one to send on.
  // plainPickler: a PlainPickler, so that it need not be called for what is plain; or None.
  PythonRequestCallback(
      pybind11::object runFunction,
      pybind11::object serialize,
      pybind11::object passOn,
      pybind11::object plainPickler);

  // The agent that owns this: it is told how long threads waited for the GIL, if it wants to know.
  void setAgent(MpiAgent& agent) {
    agent_ = &agent;
  }

  JitFuturePtr processMessage(torch::distributed::rpc::Message& request, std::vector<c10::Stream> streams)
      const override;

  std::unique_ptr<torch::distributed::rpc::RpcCommandBase> deserializePythonRpcCommand(
      std::unique_ptr<torch::distributed::rpc::RpcCommandBase> command,
      const torch::distributed::rpc::MessageType& type) const override;

  JitFuturePtr processScriptCall(
      torch::distributed::rpc::RpcCommandBase& command,
      const std::vector<c10::Stream>& streams) const override;

  JitFuturePtr processScriptRemoteCall(
      torch::distributed::rpc::RpcCommandBase& command,
      const std::vector<c10::Stream>& streams) const override;

  JitFuturePtr processRpcWithErrors(
      torch::distributed::rpc::RpcCommandBase& command,
      const torch::distributed::rpc::MessageType& type,
      const std::vector<c10::Stream>& streams) const override;

  JitFuturePtr processPythonCall(
      torch::distributed::rpc::RpcCommandBase& command,
      const std::vector<c10::Stream>& streams) const override;

  JitFuturePtr processPythonRemoteCall(
      torch::distributed::rpc::RpcCommandBase& command,
      const std::vector<c10::Stream>& streams) const override;

  JitFuturePtr processPythonRRefFetchCall(torch::distributed::rpc::RpcCommandBase& command) const override;

 private:
  std::unique_ptr<torch::distributed::rpc::RpcCommandBase> unpickle(
      torch::distributed::rpc::RpcCommandBase& command,
      const torch::distributed::rpc::MessageType& type) const;
  JitFuturePtr inStreams(JitFuturePtr scripts, const std::vector<c10::Stream>& streams) const;
  std::string whyMissing(const std::string& text) const;
  // Runs the function of `command`. Returns what `keep` (called with the GIL) makes of its result, or the future that
  // it promised its result in, or a failed one of `type`.
  JitFuturePtr run(
      torch::distributed::rpc::RpcCommandBase& command,
      const std::vector<c10::Stream>& streams,
      const c10::TypePtr& type,
      const std::function<JitFuturePtr(const pybind11::object& result)>& keep) const;

  // Shared with the futures of functions that return later, which may outlive the agent.
  std::shared_ptr<const FunctionRunner> python_;
  MpiAgent* agent_ = nullptr;
};

} // namespace torch_rpc_mpi
