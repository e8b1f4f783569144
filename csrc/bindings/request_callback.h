// Runs the requests that arrive. torch's own, but for Python functions.
#pragma once

#include <torch/csrc/distributed/rpc/request_callback_impl.h>

namespace torch_rpc_mpi {

class MpiAgent;

// As torch's, a Python function is unpickled, run, and its result pickled. Two things differ: from the call to the
// pickled result the GIL is held once, not taken again for each step; and a function that is still running when the
// interpreter ends stops where it is (see Note [Functions that outlive Python]).
//
// Any number of threads may use it: runFunction_ never changes (but is touched only with the GIL), agent_ is set before
// the first request.
class PythonRequestCallback final : public torch::distributed::rpc::RequestCallbackImpl {
 public:
  using JitFuturePtr = c10::intrusive_ptr<torch::distributed::rpc::JitFuture>;

  // runFunction: takes what torch.distributed.rpc.internal.PythonUDF pickled, returns the result, or an exception as a
  // RemoteException: as torch.distributed.rpc.internal._run_function.
  explicit PythonRequestCallback(pybind11::object runFunction) : runFunction_(std::move(runFunction)) {}
  ~PythonRequestCallback() override;

  // The agent that owns this: it is told how long threads waited for the GIL, if it wants to know.
  void setAgent(MpiAgent& agent) {
    agent_ = &agent;
  }

  std::unique_ptr<torch::distributed::rpc::RpcCommandBase> deserializePythonRpcCommand(
      std::unique_ptr<torch::distributed::rpc::RpcCommandBase> command,
      const torch::distributed::rpc::MessageType& type) const override;

  JitFuturePtr processPythonCall(
      torch::distributed::rpc::RpcCommandBase& command,
      const std::vector<c10::Stream>& streams) const override;

  JitFuturePtr processPythonRemoteCall(
      torch::distributed::rpc::RpcCommandBase& command,
      const std::vector<c10::Stream>& streams) const override;

 private:
  pybind11::object run(pybind11::object function) const;

  pybind11::object runFunction_;
  MpiAgent* agent_ = nullptr;
};

} // namespace torch_rpc_mpi
