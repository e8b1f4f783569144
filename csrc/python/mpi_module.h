// How MPI is reached, and a communicator made, in Python.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

void bindMpi(pybind11::module_& module);

} // namespace torch_rpc_mpi
