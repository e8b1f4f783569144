#include "python/interruptible_wait.h"

#include <atomic>
#include <memory>

#include <torch/csrc/distributed/rpc/py_rref.h>
#include <torch/csrc/distributed/rpc/rref_impl.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "agent/future_wait.h"
#include "agent/mpi_agent.h"
#include "python/interpreter.h"
#include "python/signals.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

namespace rpc = torch::distributed::rpc;

// All without the GIL. torch's own methods, called when there is nothing left to wait for, do everything else.

py::object waitForFuture(torch::jit::PythonFutureWrapper& future) {
  waitServingSignals(*future.fut);
  return future.wait();
}

c10::intrusive_ptr<rpc::RRef> inside(const rpc::PyRRef& rref) {
  return c10::static_intrusive_pointer_cast<rpc::RRef>(rref.toIValue().toRRef());
}

// An owner waits for the value to be made, or for a remote() to itself to fail. If that has run out of time, torch then
// says so at once.
void waitForOwnValue(const c10::intrusive_ptr<rpc::OwnerRRef>& rref) {
  const auto value = rref->getFuture();
  const auto creation = rref->getOwnerCreationFuture();
  const auto what = ThreadedEngine::Blocked::For::kValueOfThisProcess;
  if (rref->getTimedOut()) {
    return;
  }
  if (creation == nullptr || creation->completed() || value->completed()) {
    waitServingSignals(*value, what);
    return;
  }
  const auto either = c10::make_intrusive<c10::ivalue::Future>(c10::NoneType::get());
  const auto over = [either, first = std::make_shared<std::atomic<bool>>(true)](c10::ivalue::Future&) {
    if (first->exchange(false)) {
      either->markCompleted();
    }
  };
  value->addCallback(over, /*uses_future=*/false);
  creation->addCallback([value, over](c10::ivalue::Future& made) {
    if (made.hasError()) {
      over(made);
    }
  });
  waitServingSignals(*either, what);
}

c10::intrusive_ptr<rpc::OwnerRRef> insideOwner(const rpc::PyRRef& rref) {
  return c10::static_intrusive_pointer_cast<rpc::OwnerRRef>(inside(rref));
}

// What is not there cannot be fetched: its owner would wait for it.
void throwIfNotCreated(const rpc::RRef& rref) {
  const auto creation = rref.getOwnerCreationFuture();
  if (creation != nullptr && creation->completed() && creation->hasError() && !rref.getTimedOut()) {
    std::rethrow_exception(creation->exception_ptr());
  }
}

py::object localValue(const rpc::PyRRef& rref) {
  if (rref.isOwner()) {
    waitForOwnValue(insideOwner(rref));
  }
  return rref.localValue();
}

// A user fetches the value, for which torch sends one request and waits.
py::object toHere(const rpc::PyRRef& rref, float timeout) {
  if (rref.isOwner()) {
    waitForOwnValue(insideOwner(rref));
    return rref.toHere(timeout);
  }
  throwIfNotCreated(*inside(rref));
  const auto agent = rpc::RpcAgent::isCurrentRpcAgentSet()
      ? std::dynamic_pointer_cast<MpiAgent>(rpc::RpcAgent::getCurrentRpcAgent())
      : nullptr;
  if (agent == nullptr) {
    return rref.toHere(timeout);
  }
  const Caller::AnswerInSend fetched(agent->caller());
  const ThreadedEngine::Blocked blocked;
  return rref.toHere(timeout);
}

// A method for a class that another module has made. Python finds it as it finds those, so that it costs the same.
template <typename Function, typename... Extra>
py::object methodOf(const py::handle& type, const char* name, Function function, const Extra&... extra) {
  return py::cpp_function(function, py::name(name), py::is_method(type), py::call_guard<NoGil>(), extra...);
}

} // namespace

void waitServingSignals(c10::ivalue::Future& future, ThreadedEngine::Blocked::For what) {
  if (!future.completed()) {
    const ThreadedEngine::Blocked blocked(what);
    serveUntilCompleted(kPythonSignals, future);
    future.wait();
  }
}

void bindInterruptibleWaits(py::module_& module) {
  findPythonsMainThread();
  const auto future = py::module_::import("torch._C").attr("Future");
  const auto rref = py::module_::import("torch._C._distributed_rpc").attr("PyRRef");
  module.attr("future_wait") = methodOf(future, "wait", waitForFuture);
  module.attr("rref_local_value") = methodOf(rref, "local_value", localValue);
  module.attr("rref_to_here") = methodOf(rref, "to_here", toHere, py::arg("timeout") = rpc::kUnsetRpcTimeout);
}

} // namespace torch_rpc_mpi
