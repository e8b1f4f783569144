#include "agent/tasks.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

void MpiAgent::ResponseTask::complete(const PendingCall& call, const RpcMessage& response) {
  if (response->type() == rpc::MessageType::EXCEPTION) {
    ErrorTask::fail(call, std::string(response->payload().begin(), response->payload().end()));
    return;
  }
  auto storages = response->getStorages();
  call.future->markCompleted(at::IValue(response), std::move(storages));
}

void MpiAgent::ResponseTask::run() noexcept {
  try {
    complete(call_, decodeMessage(std::move(inbound_)));
  } catch (const std::exception& error) {
    ErrorTask::fail(call_, std::string("The response could not be read: ") + error.what());
  }
}

void MpiAgent::ErrorTask::fail(const PendingCall& call, const std::string& error) {
  call.future->setErrorIfNeeded(std::make_exception_ptr(std::runtime_error(error)));
}

void MpiAgent::ErrorTask::run() noexcept {
  fail(call_, error_);
}

void MpiAgent::LocalRequestTask::run() noexcept {
  // The agent may be gone by the time an asynchronous function completes.
  agent_.run(std::move(message_), [weak = agent_.weak_from_this(), id = id_](RpcMessage response) {
    const auto agent = weak.lock();
    if (agent == nullptr) {
      return;
    }
    if (auto call = agent->calls_.take(id)) {
      if (response->type() != rpc::MessageType::EXCEPTION) {
        response = copyMessage(*response);
      }
      ResponseTask::complete(*call, response);
    }
    agent->serving_.fetch_sub(1);
  });
}

} // namespace torch_rpc_mpi
