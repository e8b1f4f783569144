// Python methods of torch that wait, as they are but for serving Python's signals meanwhile.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/utils/pybind.h>

#include "engine/threaded_engine.h"

namespace torch_rpc_mpi {

// Without the GIL. Throws what a signal's handler throws, but not the future's error. What a request waits for says
// which others may run meanwhile.
void waitServingSignals(
    c10::ivalue::Future& future,
    ThreadedEngine::Blocked::For what = ThreadedEngine::Blocked::For::kAnything);

void bindInterruptibleWaits(pybind11::module_& module);

} // namespace torch_rpc_mpi
