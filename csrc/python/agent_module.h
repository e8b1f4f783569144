// The agent in Python.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

void bindAgent(pybind11::module_& module);

} // namespace torch_rpc_mpi
