// A call of a Python function, which may be sent a second time with its function pickled by value.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/distributed/autograd/rpc_messages/autograd_metadata.h>
#include <torch/csrc/distributed/rpc/rpc_agent.h>

#include "agent/call_table.h"
#include "codec/rpc_message.h"

namespace torch_rpc_mpi {

// Note [Second attempts and distributed autograd]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Within a context of distributed autograd, a call is recorded when it is made: the context gets a send function, to
// which the callee sends the gradients of the tensors in the message, under an id that the message carries. A backward
// pass waits for every send function that the context has, and torch takes none away. So the second attempt has the id
// and the send function of the first, which is led to the tensors of the second message: those of the first are among
// them, and those that a function takes along when it goes by value. The callee, which keeps a receive function by that
// id, records nothing of a call that it wants to have again (PythonRequestCallback::unpickle).
//
// Nobody else uses the send function meanwhile: gradients come only once the call has run, and a backward pass that
// begins here before it has ended would wait for it in vain, with torch as well.

// Made by the thread that makes the call, in whose context of distributed autograd, if it has one, and under whose
// profiler the call is recorded whichever thread sends it again. Used by one thread at a time.
class RepeatableCall {
 public:
  using WorkerInfo = torch::distributed::rpc::WorkerInfo;

  // rpcTimeoutSeconds: for each attempt.
  RepeatableCall(WorkerInfo dst, float rpcTimeoutSeconds);

  // Returns the future of the response.
  JitFuturePtr send(RpcMessage message);

 private:
  RpcMessage record(RpcMessage message, bool again) const;

  const WorkerInfo dst_;
  const float rpcTimeoutSeconds_;
  std::optional<torch::distributed::autograd::AutogradMetadata> recordedAs_;
  std::optional<std::string> profilingKey_;
  bool sent_ = false;
};

} // namespace torch_rpc_mpi
