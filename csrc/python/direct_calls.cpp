#include "python/direct_calls.h"

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/profiler/api.h>
#include <torch/csrc/utils/pythoncapi_compat.h>

#include "python/by_value.h"
#include "python/interpreter.h"
#include "python/interruptible_wait.h"
#include "python/pickle/plain_pickle_format.h"
#include "python/python_functions.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

using Tensors = std::vector<at::Tensor>;

// In seconds; nothing for what is not a number that may be one.
std::optional<float> timeoutOf(py::handle value) {
  if (!PyFloat_CheckExact(value.ptr()) && !PyLong_CheckExact(value.ptr())) {
    return std::nullopt;
  }
  const double seconds = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() != nullptr) { // an integer that is too large
    PyErr_Clear();
    return std::nullopt;
  }
  if (!(std::abs(seconds) <= std::numeric_limits<float>::max())) {
    return std::nullopt;
  }
  return static_cast<float>(seconds);
}

bool isPlainKeywords(py::handle kwargs) {
  if (!PyDict_CheckExact(kwargs.ptr())) {
    return false;
  }
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  while (PyDict_Next(kwargs.ptr(), &position, &key, nullptr) != 0) {
    if (!PyUnicode_Check(key)) {
      return false;
    }
  }
  return true;
}

} // namespace

DirectCalls::DirectCalls(std::shared_ptr<MpiAgent> agent, py::object pickler, TorchNames torchs)
    : agent_(std::move(agent)),
      pickler_(std::move(pickler)),
      plainObject_(pickler_.is_none() ? pickler_ : py::object(pickler_.attr("plain"))),
      plain_(plainObject_.is_none() ? nullptr : &plainObject_.cast<const PlainPickler&>()),
      torchs_(std::move(torchs)) {}

JitFuturePtr DirectCalls::make(const Call& call, bool awaited) const {
  const auto timeout = timeoutOf(call.timeout);
  const bool hasArgs = !call.args.is_none();
  const bool hasKwargs = !call.kwargs.is_none();
  const bool usual = timeout && PyCallable_Check(call.function.ptr()) != 0 &&
      (!hasArgs || PyTuple_CheckExact(call.args.ptr())) && (!hasKwargs || isPlainKeywords(call.kwargs));
  if (ended_ || !usual || torch::autograd::profiler::profilerEnabled() || torch::jit::tracer::isTracing()) {
    return nullptr;
  }
  const WorkerInfo* const dst = worker(call.to);
  if (dst == nullptr) {
    return nullptr;
  }
  const Checked checked{
      *dst,
      py::reinterpret_borrow<py::object>(call.function),
      hasArgs ? py::reinterpret_borrow<py::args>(call.args) : py::args(),
      hasKwargs ? py::reinterpret_borrow<py::kwargs>(call.kwargs) : py::kwargs(),
      *timeout,
      awaited};
  if (const auto name = operatorOf(call.function)) {
    return callOperator(checked, *name);
  }
  const py::object wrapped = asynchronous(call.function);
  const py::handle function = wrapped && isScript(wrapped) ? wrapped : call.function;
  return isScript(function) ? callScript(checked, function, !!wrapped) : callFunction(checked, !!wrapped);
}

// The function that rpc.functions.async_execution wraps in this one; null.
py::object DirectCalls::asynchronous(py::handle function) const {
  PyObject* wrapped = nullptr;
  if (PyObject_GetOptionalAttr(function.ptr(), torchs_.asyncExecution.ptr(), &wrapped) < 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(wrapped);
}

bool DirectCalls::isScript(py::handle function) const {
  return py::isinstance(function, torchs_.scriptFunction);
}

const rpc::WorkerInfo* DirectCalls::worker(py::handle to) const {
  if (PyUnicode_CheckExact(to.ptr())) {
    Py_ssize_t size = 0;
    const char* const name = PyUnicode_AsUTF8AndSize(to.ptr(), &size);
    if (name == nullptr) { // a lone surrogate
      PyErr_Clear();
      return nullptr;
    }
    return &agent_->getWorkerInfo(std::string(name, size));
  }
  if (PyLong_CheckExact(to.ptr())) {
    int overflow = 0;
    const long id = PyLong_AsLongAndOverflow(to.ptr(), &overflow);
    const bool isId = overflow == 0 && id >= 0 && id <= std::numeric_limits<rpc::worker_id_t>::max();
    return isId ? &agent_->getWorkerInfo(static_cast<rpc::worker_id_t>(id)) : nullptr;
  }
  return py::isinstance<rpc::WorkerInfo>(to) ? &to.cast<const rpc::WorkerInfo&>() : nullptr;
}

std::optional<std::string> DirectCalls::operatorOf(py::handle function) const {
  const auto identity = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(function.ptr()));
  PyObject* const name = PyDict_GetItem(torchs_.builtins.ptr(), identity.ptr());
  return name != nullptr && PyUnicode_Check(name) ? std::optional(py::handle(name).cast<std::string>()) : std::nullopt;
}

// Without the GIL. What runs Python code is done by then, but for arguments of scripts: a thread is announced as one
// that will drive for a single call, and that code may make others.
template <typename Send>
JitFuturePtr DirectCalls::make(const Checked& call, const Send& sendIt) const {
  const NoGil noGil;
  if (!call.awaited) {
    return sendIt();
  }
  Caller& caller = agent_->caller();
  caller.expectAnswer(true);
  JitFuturePtr future;
  try {
    future = sendIt();
  } catch (...) {
    caller.expectAnswer(false);
    throw;
  }
  caller.driveUntil(*future);
  waitServingSignals(*future);
  future->wait(); // which is over, but orders what follows in the current streams
  return future;
}

JitFuturePtr DirectCalls::callOperator(const Checked& call, const std::string& name) const {
  BuiltinCall match = matchBuiltin(name, call.args, call.kwargs);
  return make(call, [&] { return pyRpcBuiltin(call.dst, std::move(match), call.timeout); });
}

JitFuturePtr DirectCalls::callScript(const Checked& call, py::handle script, bool isAsync) const {
  const auto name = script.attr("qualified_name").cast<std::string>();
  // The caller's own may be changed meanwhile: it is read without the GIL, and with it again.
  const auto kwargs = py::reinterpret_steal<py::dict>(PyDict_Copy(call.kwargs.ptr()));
  return make(call, [&] { return pyRpcTorchscript(call.dst.name_, name, call.args, kwargs, call.timeout, isAsync); });
}

JitFuturePtr DirectCalls::callFunction(const Checked& call, bool isAsync) const {
  if (plain_ == nullptr || PyDict_GetItem(torchs_.api.ptr(), torchs_.defaultPickler.ptr()) != pickler_.ptr()) {
    return nullptr;
  }
  Pickled pickled = pickle(call);
  return make(call, [&] {
    return pyRpcPythonUdf(call.dst, pickled.data, pickled.tensors, call.timeout, isAsync, std::move(pickled.byValue));
  });
}

// As RpcPickler.serialize_call(), which does the rest.
DirectCalls::Pickled DirectCalls::pickle(const Checked& call) const {
  auto plain = plain_->dumpCall(call.function, call.args, call.kwargs);
  if (!plain || !plain->rrefs.empty()) {
    const py::object udf = plain_->callType()(call.function, call.args, call.kwargs);
    const auto parts = pickler_.attr("serialize_call")(udf, partsOf(std::move(plain))).cast<py::tuple>();
    Pickled pickled{parts[0].cast<std::string>(), parts[1].cast<Tensors>(), {}};
    pickled.byValue = ByValue(py::getattr(parts[0], "by_value", py::none()), pickled.data, pickled.tensors);
    return pickled;
  }
  Pickled pickled{std::move(plain->data), std::move(plain->tensors), {}};
  if (pickled.data.find("__main__") != std::string::npos) {
    pickled.data += plain_pickle::kResendable;
    pickled.byValue = ByValue(pickled.data, pickled.tensors);
  }
  return pickled;
}

} // namespace torch_rpc_mpi
