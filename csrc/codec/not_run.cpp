#include "codec/not_run.h"

#include <vector>

#include <torch/csrc/distributed/rpc/utils.h>

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

constexpr auto kNotRun = rpc::MessageType::RREF_ACK;

} // namespace

c10::intrusive_ptr<rpc::Message> notRunResponse(const std::string& why) {
  return c10::make_intrusive<rpc::Message>(
      std::vector<char>(why.begin(), why.end()), std::vector<at::Tensor>(), kNotRun);
}

std::optional<std::string> whyNotRun(const rpc::Message& response) {
  if (response.type() == kNotRun) {
    return std::string(response.payload().begin(), response.payload().end());
  }
  if (response.type() == rpc::MessageType::RUN_WITH_PROFILING_RESP) {
    std::vector<char> payload = response.payload();
    const std::vector<c10::IValue> wrapping = rpc::readWrappedPayload(payload, response); // takes it from the payload
    if (wrapping.at(0).toInt() == kNotRun) {
      return std::string(payload.begin(), payload.end());
    }
  }
  return std::nullopt;
}

} // namespace torch_rpc_mpi
