// What MPICH has in /dev/shm of a world.
#pragma once

#include <string>

namespace torch_rpc_mpi {

// Removes it, for a process that ends in MPI_Init: the files have names until all ranks have them, and whoever has made
// them may be dead. world: PMI's name of it, which no other world has.
void removeSharedFiles(const std::string& world) noexcept;

} // namespace torch_rpc_mpi
