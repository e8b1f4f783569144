#include "python/python_functions.h"

#include <memory>
#include <utility>

#include <torch/csrc/distributed/rpc/message.h>
#include <torch/csrc/distributed/rpc/python_call.h>
#include <torch/csrc/distributed/rpc/python_remote_call.h>
#include <torch/csrc/distributed/rpc/python_resp.h>
#include <torch/csrc/distributed/rpc/python_rpc_handler.h>
#include <torch/csrc/distributed/rpc/rref_context.h>
#include <torch/csrc/distributed/rpc/script_call.h>
#include <torch/csrc/distributed/rpc/script_remote_call.h>
#include <torch/csrc/distributed/rpc/script_resp.h>
#include <torch/csrc/distributed/rpc/utils.h>

#include "agent/engine_work.h"
#include "base/error_text.h"
#include "codec/not_run.h"
#include "python/builtin_operator.h"
#include "python/call_arguments.h"
#include "python/pickle/plain_pickle.h"
#include "python/python_error.h"
#include "python/repeatable_call.h"
#include "python/user_code.h"
#include "torch_compat/autograd.h"
#include "torch_compat/thread_state.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

namespace rpc = torch::distributed::rpc;

using JitFuturePtr = c10::intrusive_ptr<JitFuture>;
using MessagePtr = c10::intrusive_ptr<rpc::Message>;

// The object in a response: None and a tensor as they are, since who asks a future for it gets the Python object then;
// anything else as a Python object, made once, that takes the GIL to be let go of. So the commonest results need no
// GIL.
c10::IValue toPyIValue(const rpc::Message& response) {
  if (const auto why = whyNotRun(response)) {
    throw std::runtime_error(*why);
  }
  rpc::MessageType type = response.type();
  // Also where the answer was there before the call had returned to its thread, which reads it then.
  const EngineWork work(/*alsoRecorded=*/true);
  // Also attaches the autograd function of the tensors received, and unpacks profiling.
  const auto command = rpc::deserializeResponse(response, type);
  switch (type) {
    case rpc::MessageType::SCRIPT_RET: {
      c10::IValue value = static_cast<rpc::ScriptResp&>(*command).value();
      if (value.isTensor()) {
        return value;
      }
      const py::gil_scoped_acquire gil;
      return torch::jit::toIValue(torch::jit::toPyObject(std::move(value)), c10::PyObjectType::get());
    }
    case rpc::MessageType::PYTHON_RET: {
      const auto& value = static_cast<rpc::PythonResp&>(*command).serializedPyObj();
      if (auto plain = plainResult(value)) {
        return std::move(*plain);
      }
      auto& handler = rpc::PythonRpcHandler::getInstance(); // refuses to be called with the GIL
      const py::gil_scoped_acquire gil;
      py::object object = loadPlainResult(value);
      if (!object) {
        const UserCode code; // of the classes of what it holds
        object = handler.deserialize(value);
        if (handler.isRemoteException(object)) {
          throw PythonError(std::move(object));
        }
      }
      return torch::jit::toIValue(object, c10::PyObjectType::get());
    }
    default:
      TORCH_CHECK(false, "Unrecognized response message type ", type);
  }
}

// A Python exception as one that may be rethrown in any thread, any number of times, without the GIL.
template <typename Error>
std::exception_ptr withoutPython(const Error& error) {
  const py::gil_scoped_acquire gil;
  return std::make_exception_ptr(PythonError::of(error));
}

JitFuturePtr send(const WorkerInfo& dst, MessagePtr message, bool forceGradRecording, float rpcTimeoutSeconds) {
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

// Why the callee did not run the call, if it says so: its __main__ lacks a name.
std::optional<std::string> refusal(const JitFuture& response) {
  if (response.hasError()) {
    return std::nullopt;
  }
  return whyNotRun(*response.constValue().toCustomClass<rpc::Message>());
}

// The response, as an error if the call was not run.
JitFuturePtr ranOrFailed(JitFuture& response) {
  const auto why = refusal(response);
  if (!why) {
    return JitFuturePtr::reclaim_copy(&response);
  }
  auto failed = response.createInstance(response.elementType());
  failed->setError(std::make_exception_ptr(std::runtime_error(*why)));
  return failed;
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

// A value that stays at its worker. `sendCall` sends the call that makes it, with the ids given, and returns the future
// of the response.
template <typename SendCall>
PyRRef createRemotely(const WorkerInfo& dst, const c10::TypePtr& type, const SendCall& sendCall) {
  auto& context = rpc::RRefContext::getInstance();
  if (context.getWorkerId() != dst.id_) {
    auto userRRef = context.createUserRRef(dst.id_, type);
    const JitFuturePtr response = sendCall(userRRef->rrefId(), userRRef->forkId());
    context.addPendingUser(userRRef->forkId(), userRRef);
    userRRef->registerOwnerCreationFuture(creation(*response, [forkId = userRRef->forkId()](JitFuture& completed) {
      rpc::callback::confirmPendingUser(completed, forkId);
    }));
    return PyRRef(std::move(userRRef));
  }
  auto ownerRRef = context.createOwnerRRef(type);
  // The call goes through the agent even to oneself: until it has, this keeps the value whatever other copies do.
  context.addSelfAsFork(ownerRRef);
  const JitFuturePtr response = sendCall(ownerRRef->rrefId(), ownerRRef->rrefId());
  ownerRRef->registerOwnerCreationFuture(creation(*response, [rrefId = ownerRRef->rrefId()](JitFuture& completed) {
    auto deleted = rpc::callback::finishCreatingOwnerRRef(completed, rrefId);
    if (deleted && deleted->isPyObj()) {
      const py::gil_scoped_acquire gil;
      deleted.reset();
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

void complete(JitFuture& pyFuture, const JitFuture& response) {
  // setErrorIfNeeded(), because Python code may have completed the future that it was given.
  if (response.hasError()) {
    pyFuture.setErrorIfNeeded(response.exception_ptr());
    return;
  }
  try {
    const auto message = response.constValue().toCustomClass<rpc::Message>();
    pyFuture.markCompleted(toPyIValue(*message), response.storages());
  } catch (const py::error_already_set& error) {
    pyFuture.setErrorIfNeeded(withoutPython(error));
  } catch (const python_error& error) {
    pyFuture.setErrorIfNeeded(withoutPython(error));
  } catch (const std::exception& error) {
    const bool saysNothing = *error.what() == '\0';
    pyFuture.setErrorIfNeeded(
        saysNothing ? std::make_exception_ptr(std::runtime_error(errorText(error))) : std::current_exception());
  } catch (...) {
    pyFuture.setErrorIfNeeded(std::current_exception());
  }
}

// Completes pyFuture when the response is there, with the thread-local state that this thread has now.
void completeWith(JitFuturePtr pyFuture, JitFuture& response) {
  response.addCallback(
      withThreadState([pyFuture = std::move(pyFuture)](JitFuture& completed) { complete(*pyFuture, completed); }));
}

struct ScriptFunctionCall {
  ScriptFunctionCall(const std::string& qualifiedName, const py::tuple& args, const py::dict& kwargs)
      : name(qualifiedName),
        schema(rpc::PythonRpcHandler::getInstance().jitCompilationUnit()->get_function(name).getSchema()) {
    const py::gil_scoped_acquire gil;
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
  const py::gil_scoped_release noGil;
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
  const py::gil_scoped_release noGil;
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
      complete(*pyFuture, response);
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
  const py::gil_scoped_release noGil;
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
