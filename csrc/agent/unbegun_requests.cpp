#include "agent/unbegun_requests.h"

namespace torch_rpc_mpi {

Task::Kind ArrivedRequest::kind() const {
  using torch::distributed::rpc::MessageType;
  if (inbound.header.secondAttempt != 0) {
    return Task::Kind::kSecondAttempt;
  }
  switch (own != nullptr ? own->type() : static_cast<MessageType>(inbound.header.messageType)) {
    case MessageType::SCRIPT_REMOTE_CALL:
    case MessageType::PYTHON_REMOTE_CALL:
    case MessageType::FORWARD_AUTOGRAD_REQ: // these two may hold one of those
    case MessageType::RUN_WITH_PROFILING_REQ:
      return Task::Kind::kCreation;
    default:
      return Task::Kind::kRequest;
  }
}

UnbegunRequests::Entry* UnbegunRequests::find(int source, uint64_t id) const {
  Entry* entry = lists_[source].first;
  while (entry != nullptr && entry->id_ != id) {
    entry = entry->next_;
  }
  return entry;
}

std::optional<ArrivedRequest> UnbegunRequests::forget(int source, uint64_t id, bool comes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Entry* entry = find(source, id)) {
      return entry->takeLocked();
    }
  }
  if (comes) {
    forgotten_[source].insert(id);
  } else {
    forgotten_[source].clear();
  }
  return std::nullopt;
}

const Task* UnbegunRequests::taskOf(int source, uint64_t id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Entry* entry = find(source, id);
  return entry == nullptr ? nullptr : &entry->task_;
}

} // namespace torch_rpc_mpi
