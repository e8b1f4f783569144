// Methods that take the place of torch._C.Future's while a session lasts.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

void bindFutures(pybind11::module_& module);

} // namespace torch_rpc_mpi
