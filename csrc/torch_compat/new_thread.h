// torch's thread-local state as a thread begins with it.
//
// What an at::ThreadLocalState holds is private. Its parts are known of torch 2.6 to 2.14; each is asked after by the
// function that torch has for it, and one that a version lacks is not asked after. With a version that is not known
// here nothing is taken to be as in a new thread, which is right but slower: every state is kept and set as a whole.
#pragma once

#include <ATen/ThreadLocalState.h>

namespace torch_rpc_mpi {

// Whether this thread's state, but for its Python objects, is that of a new thread.
bool asInNewThread();

// Of these, whether there is no profiler.
bool recordsAsInNewThread();

// Whether Python code has stashed no objects in this thread's state.
bool holdsNoPythonObjects();

const at::ThreadLocalState& stateOfNewThread();

} // namespace torch_rpc_mpi
