// The extension module.
#include <string_view>
#include <tuple>

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "host/resources.h"
#include "mpi/communicator.h"
#include "python/agent_module.h"
#include "python/device_module.h"
#include "python/functions_module.h"
#include "python/futures_module.h"
#include "python/interruptible_wait.h"
#include "python/mpi_module.h"
#include "python/options_module.h"
#include "python/python_error.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

void bindResources(py::module_& module) {
  module.def("usable_cores", [] { return usableCores(); });
  module.def("usable_memory", [] { return usableMemory(); });
  module.def("cgroup_limits", [] {
    const CgroupLimits limits = cgroupLimits();
    return std::make_tuple(limits.memoryBytes, limits.cores, limits.tasks);
  });
}

void translateExceptions() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) {
        std::rethrow_exception(pointer);
      }
    } catch (const MissingRanks& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    }
  });
}

} // namespace

PYBIND11_MODULE(_C, module) {
  translateExceptions();
  translatePythonErrors();
  bindDevices(module);
  bindMpi(module);
  bindOptions(module);
  bindAgent(module);
  bindResources(module);
  bindFunctions(module);
  bindFutures(module);
  bindInterruptibleWaits(module);
  // With words that the file is searched for where it does not load: load() in _extension.py.
  static constexpr std::string_view kBuiltFor = "torch_rpc_mpi was built for torch " TORCH_VERSION;
  module.attr("__torch_version__") = kBuiltFor.substr(kBuiltFor.rfind(' ') + 1);
}

} // namespace torch_rpc_mpi
