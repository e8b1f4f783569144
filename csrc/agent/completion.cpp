#include "agent/completion.h"

#include <utility>

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/distributed/rpc/utils.h>

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

std::string timeoutText(std::chrono::milliseconds timeout) {
  std::string text = rpc::kRpcTimeoutErrorStr;
  text.replace(text.find("{}"), 2, std::to_string(timeout.count()));
  return rpc::makeRPCError(text, rpc::RPCErrorType::TIMEOUT);
}

template <typename Body>
std::exception_ptr thrownBy(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

} // namespace

Completion::Completion(const Membership& members)
    : members_(members),
      noMemory_(std::make_exception_ptr(std::runtime_error("There was no memory to complete this call"))) {}

template <typename Body>
void Completion::guarded(const PendingCall& call, const Body& body) const noexcept {
  std::exception_ptr thrown = thrownBy(body);
  if (thrown != nullptr && !call.future->completed()) { // there was no memory for its error
    thrown = thrownBy([&] { call.future->setErrorIfNeeded(noMemory_); });
  }
  if (thrown != nullptr) {
    (void)thrownBy([&] { // perhaps there is no memory for the words
      LOG(ERROR) << "A callback on the future of a call (message type " << call.type << ") to "
                 << members_.describe(call.peer) << " raised, and nobody can be told but here: " << errorText(thrown);
    });
  }
}

void Completion::complete(const PendingCall& call, const RpcMessage& response, const Streams& streams) const noexcept {
  guarded(call, [&] {
    if (response->type() == rpc::MessageType::EXCEPTION) {
      const std::vector<char>& text = response->payload();
      call.future->setErrorIfNeeded(
          std::make_exception_ptr(std::runtime_error(readableText({text.data(), text.size()}))));
      return;
    }
    // torch's guards go back to the thread's device, and make a context there: it must be one of those in use.
    const c10::OptionalDeviceGuard onDevice(
        streams.empty() ? std::nullopt : std::optional<c10::Device>(streams.front().device()));
    const c10::MultiStreamGuard guard(streams);
    auto storages = response->getStorages();
    call.future->markCompleted(at::IValue(response), std::move(storages));
  });
}

void Completion::fail(const PendingCall& call, c10::function_ref<std::string()> error) const noexcept {
  guarded(call, [&] {
    const std::string text = call.failure != nullptr ? *call.failure : error();
    call.future->setErrorIfNeeded(std::make_exception_ptr(std::runtime_error(text)));
  });
}

// See Note [Late calls].
std::string Completion::whyLate(const PendingCall& call) const {
  if (call.whyLate != nullptr) {
    return *call.whyLate;
  }
  const std::string callee = members_.describe(call.peer);
  if (lateBefore(call.timeout).count() == 0) {
    return "It was made to " + callee;
  }
  return "What became of it " + callee + " has not said: its process, its host or the link to it stands still";
}

void Completion::expire(const PendingCall& call) const noexcept {
  fail(call, [&] { return timeoutText(call.timeout) + ". " + whyLate(call); });
}

std::string Completion::shutDownText() const {
  return c10::str("RPC was shut down on ", members_.describe(members_.rank()), " before this call was answered");
}

} // namespace torch_rpc_mpi
