#include "python/python_functions.h"

#include <memory>
#include <utility>

#include <torch/csrc/distributed/rpc/message.h>
#include <torch/csrc/distributed/rpc/python_call.h>
#include <torch/csrc/distributed/rpc/python_remote_call.h>
#include <torch/csrc/distributed/rpc/python_rpc_handler.h>
#include <torch/csrc/distributed/rpc/rref_context.h>
#include <torch/csrc/distributed/rpc/script_call.h>
#include <torch/csrc/distributed/rpc/script_remote_call.h>
#include <torch/csrc/distributed/rpc/utils.h>

#include "python/builtin_operator.h"
#include "python/call_arguments.h"
#include "python/interpreter.h"
#include "python/repeatable_call.h"
#include "python/response.h"
#include "torch_compat/autograd.h"
#include "torch_compat/rref_timeout.h"
#include "torch_compat/thread_state.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

namespace rpc = torch::distributed::rpc;

JitFuturePtr send(const WorkerInfo& dst, RpcMessage message, bool forceGradRecording, float rpcTimeoutSeconds) {
  const auto agent = rpc::RpcAgent::getCurrentRpcAgent();
  return torch::distributed::autograd::sendMessageWithAutograd(
      *agent, dst, std::move(message), forceGradRecording, rpcTimeoutSeconds);
}

JitFuturePtr sendBuiltin(const WorkerInfo& dst, BuiltinCall call, float rpcTimeoutSeconds) {
  auto message = scriptCall(*call.name, std::move(call.stack));
  return send(dst, std::move(message), /*forceGradRecording=*/false, rpcTimeoutSeconds);
}

// What sends a pickled Python function, once or twice.
auto pythonUdfSender(const WorkerInfo& dst, float rpcTimeoutSeconds, bool isAsyncExecution) {
  const auto call = std::make_shared<RepeatableCall>(dst, rpcTimeoutSeconds);
  return [call, isAsyncExecution](rpc::SerializedPyObj function) {
    return call->send(rpc::PythonCall(std::move(function), isAsyncExecution).toMessage());
  };
}

// The future of an RRef's creation: of its response, and of what `settle` then tells torch's RRefContext. torch's own
// is done before that, so that who has waited for it may find the RRef unconfirmed and no events of the callee in a
// profile. And torch throws the error of the call from there: out of rpc.remote(), if it is early.
template <typename Settle>
JitFuturePtr creation(JitFuture& response, Settle settle) {
  return response.then(
      withThreadState([settle = std::move(settle)](JitFuture& completed) {
        const JitFuturePtr outcome = ranOrFailed(completed);
        settle(*outcome);
        if (outcome->hasError()) {
          std::rethrow_exception(outcome->exception_ptr());
        }
        return c10::IValue();
      }),
      c10::NoneType::get());
}

// What torch's confirmPendingUser() and finishCreatingOwnerRRef() do. But of a creation that has failed torch's RRef is
// kept for ever, unless it has run out of time, and then the wrong one says so: see torch_compat/rref_timeout.h.

bool ranOutOfTime(const JitFuture& failed) { // what is made to fail by tests counts as this for torch
  return rpc::getRPCErrorType(failed) != rpc::RPCErrorType::UNKNOWN_ERROR;
}

void settleUser(JitFuture& response, const rpc::ForkId& forkId) {
  if (!response.hasError()) {
    rpc::callback::confirmPendingUser(response, forkId);
    return;
  }
  auto& context = rpc::RRefContext::getInstance();
  if (ranOutOfTime(response)) {
    torch_compat::markTimedOut(*context.getPendingUser(forkId));
  }
  context.delPendingUser(forkId);
}

void settleOwner(JitFuture& response, rpc::OwnerRRef& rref) {
  c10::intrusive_ptr<rpc::RRef> unused;
  if (!response.hasError()) {
    unused = rpc::callback::finishCreatingOwnerRRef(response, rref.rrefId());
  } else {
    if (ranOutOfTime(response)) {
      torch_compat::markTimedOut(rref);
    } else {
      rref.setError(response.exception_ptr());
    }
    unused = rpc::RRefContext::getInstance().delForkOfOwner(rref.rrefId(), rref.rrefId());
  }
  if (unused && unused->isPyObj()) {
    const Gil gil;
    unused.reset();
  }
}

// A value that stays at its worker. `sendCall` sends the call that makes it, with the ids given, and returns the future
// of the response.
template <typename SendCall>
PyRRef createRemotely(const WorkerInfo& dst, const c10::TypePtr& type, const SendCall& sendCall) {
  auto& context = rpc::RRefContext::getInstance();
  if (context.getWorkerId() != dst.id_) {
    auto userRRef = context.createUserRRef(dst.id_, type);
    const JitFuturePtr response = sendCall(userRRef->rrefId(), userRRef->forkId());
    context.addPendingUser(userRRef->forkId(), userRRef);
    userRRef->registerOwnerCreationFuture(
        creation(*response, [forkId = userRRef->forkId()](JitFuture& completed) { settleUser(completed, forkId); }));
    return PyRRef(std::move(userRRef));
  }
  auto ownerRRef = context.createOwnerRRef(type);
  // The call goes through the agent even to oneself: until it has, this keeps the value whatever other copies do.
  context.addSelfAsFork(ownerRRef);
  const JitFuturePtr response = sendCall(ownerRRef->rrefId(), ownerRRef->rrefId());
  ownerRRef->registerOwnerCreationFuture(
      creation(*response, [rref = c10::weak_intrusive_ptr<rpc::OwnerRRef>(ownerRRef)](JitFuture& completed) {
        if (const auto owner = rref.lock()) { // else the session is over, and torch's context has forgotten it
          settleOwner(completed, *owner);
        }
      }));
  return PyRRef(std::move(ownerRRef));
}

// The response, or if the callee did not run the call, the response to the one that `sendAgain` sends, pickled by
// value.
template <typename SendAgain>
JitFuturePtr withSecondAttempt(JitFuturePtr first, ByValue byValue, SendAgain sendAgain) {
  if (!byValue.possible()) {
    return first;
  }
  return first->thenAsync(
      withThreadState([byValue = std::move(byValue), sendAgain = std::move(sendAgain)](JitFuture& response) {
        return refusal(response) ? sendAgain(byValue.pickle()) : JitFuturePtr::reclaim_copy(&response);
      }),
      first->elementType());
}

struct ScriptFunctionCall {
  ScriptFunctionCall(const std::string& qualifiedName, const py::tuple& args, const py::dict& kwargs)
      : name(qualifiedName),
        schema(rpc::PythonRpcHandler::getInstance().jitCompilationUnit()->get_function(name).getSchema()) {
    const Gil gil;
    stack = torch::jit::createStackForSchema(
        schema, py::reinterpret_borrow<py::args>(args), py::reinterpret_borrow<py::kwargs>(kwargs), std::nullopt);
    checkArguments(schema, stack, args.size());
  }

  c10::QualifiedName name;
  c10::FunctionSchema schema;
  torch::jit::Stack stack;
};

} // namespace

JitFuturePtr toPyJitFuture(const JitFuturePtr& messageJitFuture, bool hasValue) {
  if (!hasValue) {
    return messageJitFuture->then(
        withThreadState([](JitFuture& future) {
          const JitFuturePtr outcome = ranOrFailed(future);
          if (outcome->hasError()) {
            std::rethrow_exception(outcome->exception_ptr());
          }
          return c10::IValue();
        }),
        c10::NoneType::get());
  }
  // createInstance() keeps the devices.
  auto pyFuture = messageJitFuture->createInstance(c10::PyObjectType::get());
  completeWith(pyFuture, *messageJitFuture);
  return pyFuture;
}

JitFuturePtr sendBuiltin(
    const WorkerInfo& dst,
    const std::string& opName,
    const py::args& args,
    const py::kwargs& kwargs,
    float rpcTimeoutSeconds) {
  auto call = matchBuiltin(opName, args, kwargs);
  const NoGil noGil;
  return sendBuiltin(dst, std::move(call), rpcTimeoutSeconds);
}

JitFuturePtr sendPythonUdf(
    const WorkerInfo& dst,
    std::string& pickledPythonUDF,
    std::vector<torch::Tensor>& tensors,
    float rpcTimeoutSeconds,
    bool isAsyncExecution) {
  return pythonUdfSender(dst, rpcTimeoutSeconds, isAsyncExecution)({std::move(pickledPythonUDF), std::move(tensors)});
}

JitFuturePtr sendTorchscript(
    const std::string& dstWorkerName,
    const std::string& qualifiedNameStr,
    const py::tuple& argsTuple,
    const py::dict& kwargsDict,
    float rpcTimeoutSeconds,
    bool isAsyncExecution) {
  ScriptFunctionCall call(qualifiedNameStr, argsTuple, kwargsDict);
  const WorkerInfo& dst = rpc::RpcAgent::getCurrentRpcAgent()->getWorkerInfo(dstWorkerName);
  auto message = rpc::ScriptCall(call.name, std::move(call.stack), isAsyncExecution).toMessage();
  return send(dst, std::move(message), /*forceGradRecording=*/true, rpcTimeoutSeconds);
}

JitFuturePtr pyRpcBuiltin(
    const WorkerInfo& dst,
    const std::string& opName,
    const py::args& args,
    const py::kwargs& kwargs,
    float rpcTimeoutSeconds) {
  auto call = matchBuiltin(opName, args, kwargs);
  const NoGil noGil;
  return pyRpcBuiltin(dst, std::move(call), rpcTimeoutSeconds);
}

JitFuturePtr pyRpcBuiltin(const WorkerInfo& dst, BuiltinCall call, float rpcTimeoutSeconds) {
  return toPyJitFuture(sendBuiltin(dst, std::move(call), rpcTimeoutSeconds));
}

JitFuturePtr pyRpcPythonUdf(
    const WorkerInfo& dst,
    std::string& pickledPythonUDF,
    std::vector<torch::Tensor>& tensors,
    float rpcTimeoutSeconds,
    bool isAsyncExecution,
    ByValue byValue) {
  const auto sendIt = pythonUdfSender(dst, rpcTimeoutSeconds, isAsyncExecution);
  const JitFuturePtr first = sendIt({std::move(pickledPythonUDF), std::move(tensors)});
  if (!byValue.possible()) {
    return toPyJitFuture(first);
  }
  // withSecondAttempt() and toPyJitFuture() in one callback: a thread's state and a future less for each call that
  // waits.
  auto pyFuture = first->createInstance(c10::PyObjectType::get());
  first->addCallback(withThreadState([pyFuture, byValue = std::move(byValue), sendIt](JitFuture& response) {
    if (!refusal(response)) {
      completeFrom(*pyFuture, response);
      return;
    }
    try {
      completeWith(pyFuture, *sendIt(byValue.pickle()));
    } catch (...) {
      pyFuture->setErrorIfNeeded(std::current_exception());
    }
  }));
  return pyFuture;
}

// Not through sendTorchscript(): the future has the type that the function returns, so that scripts can wait for it.
JitFuturePtr pyRpcTorchscript(
    const std::string& dstWorkerName,
    const std::string& qualifiedNameStr,
    const py::tuple& argsTuple,
    const py::dict& kwargsDict,
    float rpcTimeoutSeconds,
    bool isAsyncExecution) {
  ScriptFunctionCall call(qualifiedNameStr, argsTuple, kwargsDict);
  return rpc::rpcTorchscript(dstWorkerName, call.name, call.schema, call.stack, rpcTimeoutSeconds, isAsyncExecution);
}

PyRRef pyRemoteBuiltin(
    const WorkerInfo& dst,
    const std::string& opName,
    float rpcTimeoutSeconds,
    const py::args& args,
    const py::kwargs& kwargs) {
  auto call = matchBuiltin(opName, args, kwargs);
  const NoGil noGil;
  const c10::TypePtr type = call.op->schema().returns().at(0).type();
  return createRemotely(dst, type, [&](const rpc::RRefId& rrefId, const rpc::ForkId& forkId) {
    auto message = scriptRemoteCall(*call.name, std::move(call.stack), rrefId, forkId);
    return send(dst, std::move(message), /*forceGradRecording=*/false, rpcTimeoutSeconds);
  });
}

PyRRef pyRemotePythonUdf(
    const WorkerInfo& dst,
    std::string& pickledPythonUDF,
    std::vector<torch::Tensor>& tensors,
    float rpcTimeoutSeconds,
    bool isAsyncExecution,
    ByValue byValue) {
  return createRemotely(dst, c10::PyObjectType::get(), [&](const rpc::RRefId& rrefId, const rpc::ForkId& forkId) {
    const auto call = std::make_shared<RepeatableCall>(dst, rpcTimeoutSeconds);
    const auto sendIt = [call, isAsyncExecution, rrefId, forkId](rpc::SerializedPyObj function) {
      return call->send(
          rpc::PythonRemoteCall(std::move(function), rrefId.toIValue(), forkId.toIValue(), isAsyncExecution)
              .toMessage());
    };
    JitFuturePtr first = sendIt({std::move(pickledPythonUDF), std::move(tensors)});
    return withSecondAttempt(std::move(first), std::move(byValue), sendIt);
  });
}

PyRRef pyRemoteTorchscript(
    const std::string& dstWorkerName,
    const std::string& qualifiedNameStr,
    float rpcTimeoutSeconds,
    bool isAsyncExecution,
    const py::args& args,
    const py::kwargs& kwargs) {
  ScriptFunctionCall call(qualifiedNameStr, args, kwargs);
  const WorkerInfo& dst = rpc::RpcAgent::getCurrentRpcAgent()->getWorkerInfo(dstWorkerName);
  const c10::TypePtr type = call.schema.returns().at(0).type();
  return createRemotely(dst, type, [&](const rpc::RRefId& rrefId, const rpc::ForkId& forkId) {
    auto message =
        rpc::ScriptRemoteCall(call.name, std::move(call.stack), rrefId, forkId, isAsyncExecution).toMessage();
    return send(dst, std::move(message), /*forceGradRecording=*/true, rpcTimeoutSeconds);
  });
}

} // namespace torch_rpc_mpi
