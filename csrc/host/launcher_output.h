// What this process has written for its launcher to show.
#pragma once

#include <chrono>

namespace torch_rpc_mpi {

// Waits until what is written to a pipe has been read; does nothing for what is no pipe. A launcher that is told to end
// its job may do so before it has read the last lines: MPICH's did once in 200 times on a busy machine.
void waitUntilRead(int descriptor, std::chrono::milliseconds limit = std::chrono::milliseconds(500));

} // namespace torch_rpc_mpi
