#include "agent/tasks.h"

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

MpiAgent::CompletionTask::~CompletionTask() {
  if (call_.future != nullptr) {
    completion().fail(call_, call_.failure.empty() ? agent_.shutDownText() : call_.failure);
  }
  agent_.completing_.fetch_sub(1);
}

void MpiAgent::ResponseTask::run() noexcept {
  const PendingCall call = take();
  RpcMessage response;
  try {
    response = decodeMessage(std::move(inbound_));
  } catch (const std::exception& error) {
    completion().fail(call, "The response could not be read: ", error);
    return;
  }
  completion().complete(call, response);
}

void MpiAgent::RequestTask::run() noexcept {
  const int peer = inbound_.source;
  const uint64_t id = inbound_.header.callId;
  try {
    agent_.serve(std::move(inbound_));
  } catch (const std::exception& error) { // there is not even memory to say so
    agent_.oweError(peer, id, error);
    agent_.serving_.fetch_sub(1);
  }
}

void MpiAgent::LocalRequestTask::run() noexcept {
  // The agent may be gone by the time an asynchronous function completes.
  const Respond respond = [weak = agent_.weak_from_this(), id = id_](const std::function<RpcMessage()>& make) {
    const auto agent = weak.lock();
    if (agent == nullptr) {
      return;
    }
    if (auto call = agent->calls_.take(id, agent->rank_)) {
      try {
        RpcMessage response = make();
        if (response->type() != rpc::MessageType::EXCEPTION) {
          response = copyMessage(*response);
        }
        agent->completion_.complete(*call, response);
      } catch (const std::exception& error) {
        agent->completion_.fail(*call, "The response could not be sent: ", error);
      }
    }
    agent->serving_.fetch_sub(1);
  };
  try {
    agent_.run(std::move(message_), respond);
  } catch (const std::exception& error) {
    if (auto call = agent_.calls_.take(id_, agent_.rank_)) {
      agent_.completion_.fail(*call, "", error);
    }
    agent_.serving_.fetch_sub(1);
  }
}

} // namespace torch_rpc_mpi
