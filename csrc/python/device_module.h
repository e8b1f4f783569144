// The runtime libraries of devices in Python.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

void bindDevices(pybind11::module_& module);

} // namespace torch_rpc_mpi
