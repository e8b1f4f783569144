// The end of a launcher's job when one of its ranks has failed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "mpi/mpi_library.h"

namespace torch_rpc_mpi {

// With the GIL. Ends the job, and this process with `status`, when the interpreter has ended, so that what the user
// wants done at exit is done and files are written; but after `limit` seconds at the latest, since a thread that Python
// joins, or a handler at exit, may wait for the other ranks. Prints `text` then. Only the first call counts.
void endJobAtExit(std::shared_ptr<MpiLibrary> mpi, intptr_t world, std::string text, int status, double limit);

} // namespace torch_rpc_mpi
