// Memory that runs out at a chosen moment.
#pragma once

namespace torch_rpc_mpi::testing {

// So many of the next allocations of this thread fail.
void failAllocations(int count);

} // namespace torch_rpc_mpi::testing
