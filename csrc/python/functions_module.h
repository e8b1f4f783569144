// The Python face of the entry points.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

void bindFunctions(pybind11::module_& module);

} // namespace torch_rpc_mpi
