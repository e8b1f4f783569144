// Finalises MPI when this process ends, and in no child that it has forked.
#pragma once

namespace torch_rpc_mpi {

// MPI's functions of these names.
struct MpiEnd {
  int (*initialized)(int* flag);
  int (*finalized)(int* flag);
  int (*finalize)();
};

// In the place of mpi4py, which finalises MPI in whatever process ends that has it: a forked child would leave the job
// in the name of its parent, and wait for the other ranks meanwhile. (What mpi4py does at the end besides concerns its
// process alone.) To be called before mpi4py is loaded, so that what that does to the end comes before. Returns false
// if the interpreter has no room for one more function at its exit. Once.
bool finalizeAtExit(const MpiEnd& mpi);

} // namespace torch_rpc_mpi
