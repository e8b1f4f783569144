// Whether there is a Python to run anything in.
#pragma once

#include <torch/csrc/utils/pythoncapi_compat.h>

namespace torch_rpc_mpi {

// Whether the GIL may be asked for: not before the interpreter is there, nor once it ends.
inline bool interpreterRuns() {
  return Py_IsInitialized() != 0 && Py_IsFinalizing() == 0;
}

} // namespace torch_rpc_mpi
