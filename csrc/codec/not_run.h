// The answer to a call of a Python function that was not run and may be sent again in another form.
//
// Note [How a call is told apart that was not run]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// By the type of the message, which the callee's request callback sets before any user's code has run, and of which no
// response to such a call is otherwise. Not by the text of an error: a function may raise any text, and would run
// twice. torch lets no type be added to its own, so it is one of those that answer what no user calls.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/distributed/rpc/message.h>

namespace torch_rpc_mpi {

// `why`: for the error, where the call is not sent again.
c10::intrusive_ptr<torch::distributed::rpc::Message> notRunResponse(const std::string& why);

// Of a response, also of one to a profiled call: why the call was not run, or nothing if it was.
std::optional<std::string> whyNotRun(const torch::distributed::rpc::Message& response);

} // namespace torch_rpc_mpi
