#include "python/finalize_at_exit.h"

#include <unistd.h>

#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

namespace {

// Set once, before the process can end.
MpiEnd end{};
pid_t owner = 0;

void finalize() {
  int yes = 0;
  if (getpid() != owner || end.initialized(&yes) != 0 || yes == 0) {
    return;
  }
  if (end.finalized(&yes) == 0 && yes == 0) {
    (void)end.finalize();
  }
}

} // namespace

bool finalizeAtExit(const MpiEnd& mpi) {
  end = mpi;
  owner = getpid();
  return Py_AtExit(finalize) == 0;
}

} // namespace torch_rpc_mpi
