#include "python/called_function.h"

#include <chrono>
#include <stdexcept>

#include <torch/csrc/distributed/rpc/message.h>
#include <torch/csrc/distributed/rpc/python_rpc_handler.h>

#include "base/error_text.h"
#include "python/user_code.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

TimedGil::TimedGil(MpiAgent* agent) {
  if (agent == nullptr || !agent->isGILProfilingEnabled()) {
    gil_.emplace();
    return;
  }
  const auto start = std::chrono::steady_clock::now();
  gil_.emplace();
  agent->addGilWaitTime(
      std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start));
}

PythonFunction::PythonFunction(
    MpiAgent* agent,
    const PlainPickler* plain,
    const rpc::SerializedPyObj& pickled,
    bool async)
    : isAsync(async) {
  auto& handler = rpc::PythonRpcHandler::getInstance(); // refuses to be called with the GIL
  const TimedGil gil(agent);
  try {
    if (plain != nullptr && (function = plain->loadCall(pickled))) {
      return;
    }
    const UserCode code;
    function = handler.deserialize(pickled);
    if (PyExceptionInstance_Check(function.ptr())) { // it could not be unpickled
      const auto name = py::module_::import("torch_rpc_mpi._pickler").attr("missing_in_main");
      const py::object text = name(function, py::bytes(pickled.payload_));
      if (!text.is_none()) {
        missing = text.cast<std::string>();
        function = py::object();
      }
    }
  } catch (const std::exception& error) {
    function = py::object();
    throw std::runtime_error(errorText(error)); // a Python exception must go with the GIL held
  }
}

PythonFunction::~PythonFunction() {
  if (function) {
    const py::gil_scoped_acquire gil;
    function = py::object();
  }
}

c10::intrusive_ptr<rpc::Message> PythonFunction::toMessageImpl() && {
  TORCH_INTERNAL_ASSERT(false, "an unpickled function is not sent");
}

} // namespace torch_rpc_mpi
