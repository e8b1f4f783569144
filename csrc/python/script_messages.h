// Calls of builtin operators and of TorchScript functions as messages, in torch's format.
#pragma once

#include <memory>

#include <torch/csrc/distributed/rpc/message.h>
#include <torch/csrc/distributed/rpc/rpc_command_base.h>
#include <torch/csrc/distributed/rpc/types.h>
#include <torch/csrc/jit/runtime/operator.h>

namespace torch_rpc_mpi {

// Note [Schemas in messages]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~
// A message names a builtin operator by the text of its schema. torch renders that for every call, and the callee
// parses it and renders the schemas of all overloads to find the one meant: 6 of the 30 µs that a small call took.
// Here both ends remember.

// How messages name an operator: the last two values before the ids of an RRef, if there are any.
struct BuiltinName {
  explicit BuiltinName(const torch::jit::Operator& op);

  c10::IValue schema;
  c10::IValue qualifiedName;
};

c10::intrusive_ptr<torch::distributed::rpc::Message> scriptCall(const BuiltinName& name, torch::jit::Stack stack);

c10::intrusive_ptr<torch::distributed::rpc::Message> scriptRemoteCall(
    const BuiltinName& name,
    torch::jit::Stack stack,
    const torch::distributed::rpc::RRefId& rrefId,
    const torch::distributed::rpc::ForkId& forkId);

// The ScriptCall or ScriptRemoteCall in a message of type SCRIPT_CALL or SCRIPT_REMOTE_CALL. Any thread. Throws as
// torch does.
std::unique_ptr<torch::distributed::rpc::RpcCommandBase> readScriptCall(
    const torch::distributed::rpc::Message& message);

} // namespace torch_rpc_mpi
