// Python methods of torch that wait, as they are but for serving Python's signals meanwhile.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

void bindInterruptibleWaits(pybind11::module_& module);

} // namespace torch_rpc_mpi
