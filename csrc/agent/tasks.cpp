#include "agent/tasks.h"

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

MpiAgent::CompletionTask::~CompletionTask() {
  if (call_.future != nullptr) {
    fail(call_, agent_.shutDownText());
  }
  agent_.completing_.fetch_sub(1);
}

void MpiAgent::CompletionTask::fail(const PendingCall& call, const std::string& error) {
  call.future->setErrorIfNeeded(std::make_exception_ptr(std::runtime_error(error)));
}

void MpiAgent::ResponseTask::complete(const PendingCall& call, const RpcMessage& response) {
  if (response->type() == rpc::MessageType::EXCEPTION) {
    fail(call, std::string(response->payload().begin(), response->payload().end()));
    return;
  }
  auto storages = response->getStorages();
  call.future->markCompleted(at::IValue(response), std::move(storages));
}

void MpiAgent::ResponseTask::run() noexcept {
  const PendingCall call = take();
  try {
    complete(call, decodeMessage(std::move(inbound_)));
  } catch (const std::exception& error) {
    fail(call, std::string("The response could not be read: ") + errorText(error));
  }
}

void MpiAgent::LocalRequestTask::run() noexcept {
  // The agent may be gone by the time an asynchronous function completes.
  agent_.run(std::move(message_), [weak = agent_.weak_from_this(), id = id_](RpcMessage response) {
    const auto agent = weak.lock();
    if (agent == nullptr) {
      return;
    }
    if (auto call = agent->calls_.take(id)) {
      try {
        if (response->type() != rpc::MessageType::EXCEPTION) {
          response = copyMessage(*response);
        }
      } catch (const std::exception& error) {
        response = agent->errorResponse(std::string("The response could not be sent: ") + errorText(error), id);
      }
      ResponseTask::complete(*call, response);
    }
    agent->serving_.fetch_sub(1);
  });
}

} // namespace torch_rpc_mpi
