// Python methods of torch that wait, as they are but for serving Python's signals meanwhile.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

// Without the GIL. Throws what a signal's handler throws, but not the future's error.
void waitServingSignals(c10::ivalue::Future& future);

void bindInterruptibleWaits(pybind11::module_& module);

} // namespace torch_rpc_mpi
