// RRefs whose creation has run out of time. torch's own handler of that (RRef::handleError, torch 2.6 to 2.14) keeps
// for ever the address of the first RRef of the process that it is called for, and marks that one for all later ones,
// also when it has been freed.
#pragma once

#include <torch/csrc/distributed/rpc/rref_impl.h>

namespace torch_rpc_mpi::torch_compat {

// From now on it says so where it is used.
void markTimedOut(torch::distributed::rpc::RRef& rref);

// Has torch's handler keep the address of an RRef that is nobody's and never freed, unless it has been called before.
// TorchScript's own remote calls use it.
void tameTimeoutHandler();

} // namespace torch_rpc_mpi::torch_compat
