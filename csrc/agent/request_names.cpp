#include "agent/request_names.h"

#include <algorithm>

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

constexpr RequestName kRequests[] = {
    {"SCRIPT_CALL", rpc::MessageType::SCRIPT_CALL},
    {"PYTHON_CALL", rpc::MessageType::PYTHON_CALL},
    {"SCRIPT_REMOTE_CALL", rpc::MessageType::SCRIPT_REMOTE_CALL},
    {"PYTHON_REMOTE_CALL", rpc::MessageType::PYTHON_REMOTE_CALL},
    {"SCRIPT_RREF_FETCH_CALL", rpc::MessageType::SCRIPT_RREF_FETCH_CALL},
    {"PYTHON_RREF_FETCH_CALL", rpc::MessageType::PYTHON_RREF_FETCH_CALL},
    {"RREF_USER_DELETE", rpc::MessageType::RREF_USER_DELETE},
    {"RREF_FORK_REQUEST", rpc::MessageType::RREF_FORK_REQUEST},
    {"RREF_CHILD_ACCEPT", rpc::MessageType::RREF_CHILD_ACCEPT},
    {"FORWARD_AUTOGRAD_REQ", rpc::MessageType::FORWARD_AUTOGRAD_REQ},
    {"BACKWARD_AUTOGRAD_REQ", rpc::MessageType::BACKWARD_AUTOGRAD_REQ},
    {"CLEANUP_AUTOGRAD_CONTEXT_REQ", rpc::MessageType::CLEANUP_AUTOGRAD_CONTEXT_REQ},
    {"RUN_WITH_PROFILING_REQ", rpc::MessageType::RUN_WITH_PROFILING_REQ},
    {"RREF_BACKWARD_REQ", rpc::MessageType::RREF_BACKWARD_REQ}, // no faults: see faultableRequests()
};

} // namespace

std::span<const RequestName> faultableRequests() {
  return std::span(kRequests).first(std::size(kRequests) - 1);
}

const char* nameOfRequest(rpc::MessageType type) {
  const auto* const found = std::ranges::find(kRequests, type, &RequestName::second);
  return found == std::end(kRequests) ? "" : found->first;
}

} // namespace torch_rpc_mpi
