#pragma once

namespace torch_rpc_mpi {

// Gives memory that was freed back to the system, where malloc would keep it for later: glibc's does so with blocks of
// up to 32 MiB once one such has been freed. For moments at which much was freed that will not be asked for soon. Takes
// a millisecond or so, for many threads at once no longer than for two.
void giveBackFreedMemory() noexcept;

} // namespace torch_rpc_mpi
