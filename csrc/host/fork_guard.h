// Whether this process is a fork()ed child of one that uses RPC. Such a child has the memory of an agent but none of
// its threads, and must not touch the parent's MPI.
//
// Note [Locks in a forked child]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A thread of the parent may hold any lock at the moment of the fork, and in the child nobody unlocks it. Calls of RPC
// are refused in a child, but it frees what it inherited: a DataLoader's worker the tensors that its parent received,
// which go back to pools. So what is reached by destructors takes no lock in a child: there memory goes past the pools,
// to the system, whose own allocator is safe across fork().
#pragma once

namespace torch_rpc_mpi {

// Whoever asks inForkedChild() calls this before a fork can matter; later children know.
void watchForks();
bool inForkedChild();

} // namespace torch_rpc_mpi
