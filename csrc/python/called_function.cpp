#include "python/called_function.h"

#include <chrono>
#include <stdexcept>
#include <string_view>

#include <torch/csrc/distributed/rpc/message.h>
#include <torch/csrc/distributed/rpc/python_rpc_handler.h>

#include "agent/running_requests.h"
#include "base/clock.h"
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
  const auto start = Clock::now();
  gil_.emplace();
  agent->addGilWaitTime(std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start));
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
    const Gil gil;
    function = py::object();
  }
}

namespace {

std::string_view utf8(PyObject* text) noexcept {
  Py_ssize_t bytes = 0;
  const char* const data = text != nullptr && PyUnicode_Check(text) ? PyUnicode_AsUTF8AndSize(text, &bytes) : nullptr;
  if (data == nullptr) {
    PyErr_Clear(); // a lone surrogate
    return {};
  }
  return {data, static_cast<size_t>(bytes)};
}

} // namespace

void nameCalledFunction(const py::object& call) noexcept {
  if (!PyTuple_Check(call.ptr()) || PyTuple_GET_SIZE(call.ptr()) == 0) {
    return;
  }
  PyObject* function = PyTuple_GET_ITEM(call.ptr(), 0);
  if (PyMethod_Check(function)) {
    function = PyMethod_GET_FUNCTION(function);
  }
  if (PyFunction_Check(function)) {
    const auto* const made = reinterpret_cast<PyFunctionObject*>(function);
    RunningRequests::nameFunction(utf8(made->func_module), utf8(made->func_qualname));
  } else if (PyCFunction_Check(function)) {
    const auto* const builtin = reinterpret_cast<PyCFunctionObject*>(function);
    RunningRequests::nameFunction(utf8(builtin->m_module), builtin->m_ml->ml_name);
  } else {
    RunningRequests::nameFunction({}, Py_TYPE(function)->tp_name);
  }
}

c10::intrusive_ptr<rpc::Message> PythonFunction::toMessageImpl() && {
  TORCH_INTERNAL_ASSERT(false, "an unpickled function is not sent");
}

} // namespace torch_rpc_mpi
