#include "agent/faults.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/rpc/rpc_agent.h>
#include <torch/csrc/distributed/rpc/utils.h>

#include "agent/request_names.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

rpc::MessageType typeOf(const std::string& name) {
  const auto known = faultableRequests();
  const auto found = std::ranges::find_if(known, [&](const RequestName& request) { return name == request.first; });
  TORCH_CHECK(
      found != known.end(), "No request is called '", name, "'. The requests are ",
      c10::Join(", ", messageTypeNames()));
  return found->second;
}

} // namespace

std::vector<std::string> messageTypeNames() {
  std::vector<std::string> names;
  for (const auto& [name, type] : faultableRequests()) {
    names.emplace_back(name);
  }
  return names;
}

Faults::Faults(const FaultOptions& options) : numFailSends_(options.numFailSends) {
  TORCH_CHECK(numFailSends_ >= 0, "num_fail_sends must not be negative, but is ", numFailSends_);
  for (const std::string& name : options.messagesToFail) {
    toFail_.push_back(typeOf(name));
  }
  for (const auto& [name, seconds] : options.messagesToDelay) {
    TORCH_CHECK(seconds >= 0, "The delay of ", name, " must not be negative, but is ", seconds, " s");
    toDelay_[typeOf(name)] = std::chrono::milliseconds(std::llround(seconds * rpc::kSecToMsConversion));
  }
}

std::optional<std::string> Faults::failureOf(const rpc::Message& request) {
  const rpc::MessageType type = request.type();
  if (std::find(toFail_.begin(), toFail_.end(), type) == toFail_.end()) {
    return std::nullopt;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  int& failures = failures_[{type, request.payload()}];
  if (failures >= numFailSends_) {
    return std::nullopt;
  }
  ++failures;
  return rpc::makeRPCError(
      c10::str("This ", nameOfRequest(type), " was not sent, as the test asks for: ", failures, " of ", numFailSends_),
      rpc::RPCErrorType::INTENTIONAL_FAILURE);
}

bool Faults::torchRetries(rpc::MessageType type) {
  return type == rpc::MessageType::RREF_USER_DELETE || type == rpc::MessageType::RREF_FORK_REQUEST ||
      type == rpc::MessageType::RREF_CHILD_ACCEPT || type == rpc::MessageType::CLEANUP_AUTOGRAD_CONTEXT_REQ;
}

std::chrono::milliseconds Faults::delayOf(rpc::MessageType type) const {
  const auto found = toDelay_.find(type);
  return found == toDelay_.end() ? std::chrono::milliseconds(0) : found->second;
}

void Faults::runLater(std::chrono::milliseconds delay, std::function<void()> task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  delayed_.push_back(startThread("a message that a test delays", [delay, task = std::move(task)] {
    std::this_thread::sleep_for(delay);
    task();
  }));
}

void Faults::awaitDelayed() {
  std::vector<std::thread> delayed;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    delayed.swap(delayed_);
  }
  for (std::thread& thread : delayed) {
    thread.join();
  }
}

} // namespace torch_rpc_mpi
