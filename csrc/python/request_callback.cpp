#include "python/request_callback.h"

#include <optional>

#include <c10/core/StreamGuard.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/distributed/autograd/rpc_messages/rpc_with_autograd.h>
#include <torch/csrc/distributed/autograd/rpc_messages/rpc_with_profiling_req.h>
#include <torch/csrc/distributed/rpc/python_call.h>
#include <torch/csrc/distributed/rpc/python_remote_call.h>
#include <torch/csrc/distributed/rpc/python_resp.h>
#include <torch/csrc/distributed/rpc/python_rpc_handler.h>
#include <torch/csrc/distributed/rpc/rref_context.h>
#include <torch/csrc/distributed/rpc/rref_impl.h>
#include <torch/csrc/distributed/rpc/rref_proto.h>
#include <torch/csrc/distributed/rpc/script_call.h>
#include <torch/csrc/distributed/rpc/script_remote_call.h>
#include <torch/csrc/distributed/rpc/script_resp.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "agent/mpi_agent.h"
#include "agent/running_requests.h"
#include "base/error_text.h"
#include "codec/not_run.h"
#include "engine/threaded_engine.h"
#include "python/call_arguments.h"
#include "python/called_function.h"
#include "python/function_runner.h"
#include "python/python_functions.h"
#include "python/script_messages.h"
#include "python/user_code.h"
#include "torch_compat/profiler.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace autograd = torch::distributed::autograd;
namespace rpc = torch::distributed::rpc;

namespace {

// What a function of @rpc.functions.async_execution returned. With the GIL.
JitFuturePtr futureIn(const py::object& result) {
  try {
    return result.cast<torch::jit::PythonFutureWrapper&>().fut;
  } catch (const py::cast_error&) {
    const auto type = py::type::of(result);
    // As torch words it: programs may look for that.
    throw std::runtime_error(
        c10::str(
            "Functions decorated with @rpc.async_function must return a torch.futures.Future object, but got ",
            type.attr("__module__").cast<std::string>(), ".", type.attr("__qualname__").cast<std::string>()));
  }
}

JitFuturePtr failed(const std::string& error, const c10::TypePtr& type) {
  auto future = c10::make_intrusive<rpc::JitFuture>(type);
  future->setError(std::make_exception_ptr(std::runtime_error(error)));
  return future;
}

// Whether there are RRefs of this process without values among them.
bool lackValues(const torch::jit::Stack& arguments) {
  bool lacks = false;
  for (const at::IValue& argument : arguments) {
    argument.visit([&](const at::IValue& each) {
      if (each.isRRef()) {
        const auto owner = c10::dynamic_intrusive_pointer_cast<rpc::OwnerRRef>(each.toRRef());
        lacks = lacks || (owner != nullptr && !owner->hasValue());
      }
      return lacks || each.isIntList() || each.isDoubleList() || each.isBoolList() || each.isTensorList();
    });
  }
  return lacks;
}

// While one lives, a function of TorchScript counts as blocked if it may wait for values, which it does inside of
// torch.
class MayBlock {
 public:
  explicit MayBlock(const rpc::ScriptCall& call) {
    if (!call.hasOp() && lackValues(call.stack())) {
      blocked_.emplace(ThreadedEngine::Blocked::For::kValuePerhaps);
    }
  }

 private:
  std::optional<ThreadedEngine::Blocked> blocked_;
};

c10::TypePtr messageType() {
  return c10::getCustomClassType<c10::intrusive_ptr<rpc::Message>>();
}

} // namespace

PythonRequestCallback::PythonRequestCallback(
    py::object runFunction,
    py::object serialize,
    py::object passOn,
    py::object plainPickler)
    : python_(
          std::make_shared<FunctionRunner>(
              std::move(runFunction),
              std::move(serialize),
              std::move(passOn),
              std::move(plainPickler))) {}

// What takes the place of a command because it calls a Python function; null for other commands. One that wraps another
// gets the wrapped one's replacement here.
std::unique_ptr<rpc::RpcCommandBase> PythonRequestCallback::unpickle(
    rpc::RpcCommandBase& command,
    const rpc::MessageType& type) const {
  const auto unpickleWrapped = [&](auto& wrapper) {
    if (auto function = unpickle(wrapper.wrappedRpc(), wrapper.wrappedMessageType())) {
      wrapper.setWrappedRpc(std::move(function));
    }
    return nullptr;
  };
  switch (type) {
    case rpc::MessageType::PYTHON_CALL: {
      const auto& call = static_cast<rpc::PythonCall&>(command);
      return std::make_unique<PythonFunction>(
          agent_, python_->plainPickler(), call.serializedPyObj(), call.isAsyncExecution());
    }
    case rpc::MessageType::PYTHON_REMOTE_CALL: {
      const auto& call = static_cast<rpc::PythonRemoteCall&>(command);
      const auto id = rpc::RRefId::fromIValue(call.retRRefId());
      try {
        auto function = std::make_unique<PythonFunction>(
            agent_, python_->plainPickler(), call.serializedPyObj(), call.isAsyncExecution());
        function->result.emplace(id, rpc::ForkId::fromIValue(call.retForkId()));
        return function;
      } catch (...) { // else a to_here() that has come before would wait for ever, and a graceful shutdown for it
        rpc::RRefContext::getInstance()
            .getOrCreateOwnerRRef(id, c10::PyObjectType::get())
            ->setError(std::current_exception());
        throw;
      }
    }
    case rpc::MessageType::FORWARD_AUTOGRAD_REQ: {
      auto& recorded = static_cast<autograd::RpcWithAutograd&>(command);
      unpickleWrapped(recorded);
      const auto* function = dynamic_cast<PythonFunction*>(&recorded.wrappedRpc());
      if (function != nullptr && !function->missing.empty()) {
        recorded.tensors().clear(); // see Note [Second attempts and distributed autograd]
      }
      return nullptr;
    }
    case rpc::MessageType::RUN_WITH_PROFILING_REQ:
      return unpickleWrapped(static_cast<autograd::RpcWithProfilingReq&>(command));
    default:
      return nullptr;
  }
}

JitFuturePtr PythonRequestCallback::processMessage(rpc::Message& request, std::vector<c10::Stream> streams) const {
  const rpc::MessageType type = request.type();
  std::optional<MaybeUserCode> code;
  if (type != rpc::MessageType::PYTHON_CALL && type != rpc::MessageType::PYTHON_REMOTE_CALL) {
    code.emplace();
  }
  const bool isScript = type == rpc::MessageType::SCRIPT_CALL || type == rpc::MessageType::SCRIPT_REMOTE_CALL;
  // A profiler of the whole process records what runs in torch's own.
  if (!isScript || wholeProcessIsProfiled()) {
    return RequestCallbackImpl::processMessage(request, std::move(streams));
  }
  auto& context = rpc::RRefContext::getInstance();
  try {
    context.recordThreadLocalPendingRRefs();
    const std::shared_ptr<rpc::RpcCommandBase> call = readScriptCall(request);
    const JitFuturePtr argumentsReady = context.waitForThreadLocalPendingRRefs(); // never fails
    if (argumentsReady->completed()) {
      return processRpcWithErrors(*call, type, streams);
    }
    return argumentsReady->thenAsync(
        [this, call, type, streams = std::move(streams)](rpc::JitFuture& /*arguments*/) {
          return processRpcWithErrors(*call, type, streams);
        },
        messageType());
  } catch (...) {
    context.clearRecordedPendingRRefsOnError();
    throw; // the agent answers for it, as for any error
  }
}

std::unique_ptr<rpc::RpcCommandBase> PythonRequestCallback::deserializePythonRpcCommand(
    std::unique_ptr<rpc::RpcCommandBase> command,
    const rpc::MessageType& type) const {
  auto function = unpickle(*command, type);
  return function ? std::move(function) : std::move(command);
}

JitFuturePtr PythonRequestCallback::processScriptCall(
    rpc::RpcCommandBase& command,
    const std::vector<c10::Stream>& streams) const {
  auto& call = static_cast<rpc::ScriptCall&>(command);
  const MayBlock mayBlock(call);
  RunningRequests::nameFunction({}, call.hasOp() ? call.op()->schema().name() : call.qualifiedName().qualifiedName());
  const JitFuturePtr result = call.hasOp()
      ? runJitOperator(*call.op(), call.stackRef(), streams)
      : inStreams(runJitFunction(call.qualifiedName(), call.stackRef(), streams, call.isAsyncExecution()), streams);
  return result->then(
      [](rpc::JitFuture& done) {
        checkResult(done.value());
        return withStorages(rpc::ScriptResp(done.value()).toMessage());
      },
      messageType());
}

// The future of a TorchScript function knows of no devices, and so nobody who takes its value would wait for the
// streams in which it was written.
JitFuturePtr PythonRequestCallback::inStreams(JitFuturePtr scripts, const std::vector<c10::Stream>& streams) const {
  if (streams.empty() || !scripts->devices().empty()) {
    return scripts;
  }
  auto result = c10::make_intrusive<rpc::JitFuture>(scripts->elementType(), agent_->getDevices());
  scripts->addCallback([result, streams](rpc::JitFuture& done) {
    const c10::MultiStreamGuard guard(streams);
    if (done.hasError()) {
      result->setError(done.exception_ptr());
    } else {
      result->markCompleted(done.value());
    }
  });
  return result;
}

// Likewise: what torch tells the RRef it tells in the streams of this thread.
JitFuturePtr PythonRequestCallback::processScriptRemoteCall(
    rpc::RpcCommandBase& command,
    const std::vector<c10::Stream>& streams) const {
  const MayBlock mayBlock(static_cast<rpc::ScriptRemoteCall&>(command));
  const c10::MultiStreamGuard guard(streams);
  return RequestCallbackImpl::processScriptRemoteCall(command, streams);
}

// The one command that torch lets nobody replace, and whose value may be one that cannot be sent.
JitFuturePtr PythonRequestCallback::processRpcWithErrors(
    rpc::RpcCommandBase& command,
    const rpc::MessageType& type,
    const std::vector<c10::Stream>& streams) const {
  if (type != rpc::MessageType::SCRIPT_RREF_FETCH_CALL) {
    return RequestCallbackImpl::processRpcWithErrors(command, type, streams);
  }
  try {
    return retrieveOwnerRRef(static_cast<rpc::ScriptRRefFetchCall&>(command).rrefId())
        ->then(
            [](rpc::JitFuture& done) {
              checkResult(done.value());
              return withStorages(rpc::ScriptRRefFetchRet({done.value()}).toMessage());
            },
            messageType());
  } catch (const std::exception& error) {
    return failed(errorText(error), messageType());
  }
}

JitFuturePtr PythonRequestCallback::run(
    rpc::RpcCommandBase& command,
    const std::vector<c10::Stream>& streams,
    const c10::TypePtr& type,
    const std::function<JitFuturePtr(const py::object& result)>& keep) const {
  auto& call = static_cast<PythonFunction&>(command);
  const c10::MultiStreamGuard guard(streams);
  auto& handler = rpc::PythonRpcHandler::getInstance();
  const TimedGil gil(agent_);
  nameCalledFunction(call.function);
  try {
    const py::object result = python_->run(std::exchange(call.function, py::object()));
    return call.isAsync && !handler.isRemoteException(result) ? futureIn(result) : keep(result);
  } catch (const std::exception& error) {
    return failed(errorText(error), type);
  }
}

std::string PythonRequestCallback::whyMissing(const std::string& text) const {
  return c10::str(
      "On ", agent_->getWorkerInfo(), ": the call was not run, because a name of __main__ is missing: ", text);
}

JitFuturePtr PythonRequestCallback::processPythonCall(
    rpc::RpcCommandBase& command,
    const std::vector<c10::Stream>& streams) const {
  const auto& call = static_cast<PythonFunction&>(command);
  if (!call.missing.empty()) {
    return asFuture(notRunResponse(whyMissing(call.missing)));
  }
  std::optional<rpc::SerializedPyObj> pickled;
  const JitFuturePtr later = run(command, streams, messageType(), [&](const py::object& result) {
    pickled = python_->serialize(result);
    return JitFuturePtr();
  });
  if (pickled) {                                // the response is made without the GIL
    const c10::MultiStreamGuard guard(streams); // in which its tensors were written
    return asFuture(rpc::PythonResp(std::move(*pickled)).toMessage());
  }
  return later->then(
      [python = python_](rpc::JitFuture& future) {
        return withStorages(rpc::PythonResp(python->serialize(future)).toMessage());
      },
      messageType());
}

JitFuturePtr PythonRequestCallback::processPythonRemoteCall(
    rpc::RpcCommandBase& command,
    const std::vector<c10::Stream>& streams) const {
  const auto& call = static_cast<PythonFunction&>(command);
  if (!call.missing.empty()) { // before the RRef is made: the caller sends the call again, with the same ids
    return asFuture(notRunResponse(whyMissing(call.missing)));
  }
  // The OwnerRRef is there before the function runs (torch makes it after). If the caller gives the call up meanwhile,
  // it tells to delete an RRef that is known here; of one that is not, the value would stay for ever.
  const auto value = c10::make_intrusive<rpc::JitFuture>(c10::PyObjectType::get(), agent_->getDevices());
  JitFuturePtr response = assignOwnerRRef(call.result->first, call.result->second, value);
  run(command, streams, value->elementType(), [this](const py::object& result) {
    return asFuture(torch::jit::toIValue(result, c10::PyObjectType::get()), c10::PyObjectType::get());
  })->addCallback([value](rpc::JitFuture& done) {
    if (done.hasError()) {
      value->setError(done.exception_ptr());
    } else {
      value->markCompleted(done.value(), done.storages());
    }
  });
  return response;
}

JitFuturePtr PythonRequestCallback::processPythonRRefFetchCall(rpc::RpcCommandBase& command) const {
  auto& fetch = static_cast<rpc::PythonRRefFetchCall&>(command);
  return retrieveOwnerRRef(fetch.rrefId())
      ->then(
          [python = python_](rpc::JitFuture& future) {
            return withStorages(rpc::PythonRRefFetchRet(python->serialize(future).toIValues()).toMessage());
          },
          messageType());
}

} // namespace torch_rpc_mpi
