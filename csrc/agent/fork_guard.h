// Whether this process is a fork()ed child of the one that initialised RPC. Such a child has the memory of an agent but
// none of its threads, and must not touch the parent's MPI.
#pragma once

namespace torch_rpc_mpi {

// Call once an agent exists; later children know.
void watchForks();
bool inForkedChild();

} // namespace torch_rpc_mpi
