#include "agent/completion.h"

#include <utility>

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

template <typename Body>
void guarded(const Membership& members, const PendingCall& call, const Body& body) noexcept {
  std::string what;
  try {
    body();
    return;
  } catch (const std::exception& error) {
    what = errorText(error);
  } catch (...) {
    what = "something that is no std::exception";
  }
  LOG(ERROR) << "A callback on the future of a call (message type " << call.type << ") to "
             << members.describe(call.peer) << " raised, and nobody can be told but here: " << what;
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

} // namespace torch_rpc_mpi
