#include "python/response.h"

#include <stdexcept>
#include <string_view>
#include <utility>

#include <torch/csrc/distributed/autograd/rpc_messages/rpc_with_autograd.h>
#include <torch/csrc/distributed/autograd/rpc_messages/rpc_with_profiling_resp.h>
#include <torch/csrc/distributed/rpc/python_resp.h>
#include <torch/csrc/distributed/rpc/python_rpc_handler.h>
#include <torch/csrc/distributed/rpc/rref_proto.h>
#include <torch/csrc/distributed/rpc/script_resp.h>
#include <torch/csrc/distributed/rpc/utils.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "agent/engine_work.h"
#include "base/error_text.h"
#include "codec/not_run.h"
#include "python/interpreter.h"
#include "python/pickle/plain_pickle.h"
#include "python/python_error.h"
#include "python/user_code.h"
#include "torch_compat/thread_state.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace autograd = torch::distributed::autograd;
namespace rpc = torch::distributed::rpc;

using JitFuture = c10::ivalue::Future;

namespace {

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
      const Gil gil;
      return torch::jit::toIValue(torch::jit::toPyObject(std::move(value)), c10::PyObjectType::get());
    }
    case rpc::MessageType::PYTHON_RET: {
      const auto& value = static_cast<rpc::PythonResp&>(*command).serializedPyObj();
      if (auto plain = plainResult(value)) {
        return std::move(*plain);
      }
      auto& handler = rpc::PythonRpcHandler::getInstance(); // refuses to be called with the GIL
      const Gil gil;
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
  const Gil gil;
  return std::make_exception_ptr(PythonError::of(error));
}

// Whether the names are in it by which pickles of this package's and of torch's name RRefs.
bool mayHoldRRefs(const rpc::Message& response) {
  const std::string_view payload(response.payload().data(), response.payload().size());
  return payload.find("_load") != std::string_view::npos ||
      payload.find("torch.distributed.rpc") != std::string_view::npos;
}

} // namespace

void letGoOf(const rpc::Message& late) {
  if (!mayHoldRRefs(late)) {
    return;
  }
  rpc::MessageType type = late.type();
  std::unique_ptr<rpc::RpcCommandBase> command;
  // Taken out of what they come in, not by torch's function, which would add them to a backward pass or a profile.
  if (type == rpc::MessageType::FORWARD_AUTOGRAD_RESP) {
    const auto recorded = autograd::RpcWithAutograd::fromMessage(late);
    type = recorded->wrappedMessageType();
    command = std::move(*recorded).moveWrappedRpc();
  } else if (type == rpc::MessageType::RUN_WITH_PROFILING_RESP) {
    const auto profiled = autograd::RpcWithProfilingResp::fromMessage(late);
    type = profiled->wrappedMessageType();
    command = std::move(*profiled).moveWrappedRpc();
  } else {
    command = rpc::deserializeResponse(late, type); // with the RRefs of TorchScript
  }
  std::optional<rpc::SerializedPyObj> pickled;
  if (type == rpc::MessageType::PYTHON_RET) {
    pickled = static_cast<rpc::PythonResp&>(*command).serializedPyObj();
  } else if (type == rpc::MessageType::PYTHON_RREF_FETCH_RET) {
    pickled = rpc::SerializedPyObj::fromIValues(static_cast<rpc::PythonRRefFetchRet&>(*command).values());
  }
  if (pickled) {
    auto& handler = rpc::PythonRpcHandler::getInstance();
    const Gil gil;
    const UserCode code;
    (void)handler.deserialize(*pickled);
  }
}

std::optional<std::string> refusal(const JitFuture& response) {
  if (response.hasError()) {
    return std::nullopt;
  }
  return whyNotRun(*response.constValue().toCustomClass<rpc::Message>());
}

JitFuturePtr ranOrFailed(JitFuture& response) {
  const auto why = refusal(response);
  if (!why) {
    return JitFuturePtr::reclaim_copy(&response);
  }
  auto failed = response.createInstance(response.elementType());
  failed->setError(std::make_exception_ptr(std::runtime_error(*why)));
  return failed;
}

void completeFrom(JitFuture& pyFuture, const JitFuture& response) {
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

void completeWith(JitFuturePtr pyFuture, JitFuture& response) {
  response.addCallback(
      withThreadState([pyFuture = std::move(pyFuture)](JitFuture& completed) { completeFrom(*pyFuture, completed); }));
}

} // namespace torch_rpc_mpi
