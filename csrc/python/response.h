// What the caller of a function makes of the response.
#pragma once

#include <optional>
#include <string>

#include "agent/call_table.h"

namespace torch_rpc_mpi {

// `response`: the completed future of a call, as the agent returns it.

// Why the callee did not run the call, if it says so: its __main__ lacks a name.
std::optional<std::string> refusal(const c10::ivalue::Future& response);
// The response, as an error if the call was not run.
JitFuturePtr ranOrFailed(c10::ivalue::Future& response);

// Completes pyFuture with the Python object, or the error, that the response holds; takes the GIL if it must.
void completeFrom(c10::ivalue::Future& pyFuture, const c10::ivalue::Future& response);
// The same when the response is there, with the thread-local state that this thread has now.
void completeWith(JitFuturePtr pyFuture, c10::ivalue::Future& response);

// Lets go of the RRefs in a response that nobody awaits any more: its sender keeps what it has forked for them until it
// hears of them, and a graceful shutdown waits for that.
void letGoOf(const torch::distributed::rpc::Message& late);

} // namespace torch_rpc_mpi
