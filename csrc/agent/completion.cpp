#include "agent/completion.h"

#include <utility>

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

void logOf(const Membership& members, const PendingCall& call, const std::exception_ptr& error) noexcept {
  try {
    LOG(ERROR) << "A callback on the future of a call (message type " << call.type << ") to "
               << members.describe(call.peer) << " raised, and nobody can be told but here: " << errorText(error);
  } catch (const std::exception&) { // no memory for the words
  }
}

// What is thrown before the future is complete, for want of memory, completes it.
template <typename Body>
void guarded(const Membership& members, const PendingCall& call, const Body& body) noexcept {
  std::exception_ptr thrown;
  try {
    body();
    return;
  } catch (...) {
    thrown = std::current_exception();
  }
  if (!call.future->completed()) {
    try {
      call.future->setErrorIfNeeded(std::exchange(thrown, nullptr));
    } catch (...) {
      thrown = std::current_exception();
    }
  }
  if (thrown != nullptr) {
    logOf(members, call, thrown);
  }
}

} // namespace

void Completion::complete(const PendingCall& call, const RpcMessage& response) const noexcept {
  guarded(members_, call, [&] {
    if (response->type() == rpc::MessageType::EXCEPTION) {
      const std::vector<char>& text = response->payload();
      call.future->setErrorIfNeeded(std::make_exception_ptr(std::runtime_error(std::string(text.begin(), text.end()))));
      return;
    }
    auto storages = response->getStorages();
    call.future->markCompleted(at::IValue(response), std::move(storages));
  });
}

void Completion::fail(const PendingCall& call, const std::string& error) const noexcept {
  guarded(members_, call, [&] { call.future->setErrorIfNeeded(std::make_exception_ptr(std::runtime_error(error))); });
}

void Completion::fail(const PendingCall& call, const char* what, const std::exception& error) const noexcept {
  guarded(members_, call, [&] {
    call.future->setErrorIfNeeded(std::make_exception_ptr(std::runtime_error(what + errorText(error))));
  });
}

} // namespace torch_rpc_mpi
