#include "plain_results.h"

#include <string_view>

namespace torch_rpc_mpi {

namespace {

constexpr std::string_view kProtocol4 = "\x80\x04";
constexpr std::string_view kProtocol5 = "\x80\x05"; // cloudpickle's, and that of Python from 3.14 on

// A call of _receive_tensor(0), in the one frame of such a pickle.
constexpr std::string_view kFrame("\x95\x34\0\0\0\0\0\0\0", 9);
constexpr std::string_view kTensor(
    "\x8c\x16torch_rpc_mpi._pickler\x94\x8c\x0f_receive_tensor\x94\x93\x94K\0\x85\x94R\x94.",
    0x34);
constexpr std::string_view kNone = "N.";

bool startsWith(std::string_view text, std::string_view start) {
  return text.substr(0, start.size()) == start;
}

} // namespace

const std::string& pickledNone() {
  static const std::string pickle = std::string(kProtocol4) + std::string(kNone);
  return pickle;
}

const std::string& pickledTensor() {
  static const std::string pickle = std::string(kProtocol4) + std::string(kFrame) + std::string(kTensor);
  return pickle;
}

std::optional<c10::IValue> plainResult(const torch::distributed::rpc::SerializedPyObj& result) {
  std::string_view pickle = result.payload_;
  if (!startsWith(pickle, kProtocol4) && !startsWith(pickle, kProtocol5)) {
    return std::nullopt;
  }
  pickle.remove_prefix(kProtocol4.size());
  if (pickle == kNone) {
    return c10::IValue();
  }
  if (result.tensors_.size() == 1 && startsWith(pickle, kFrame) && pickle.substr(kFrame.size()) == kTensor) {
    return result.tensors_.front();
  }
  return std::nullopt;
}

} // namespace torch_rpc_mpi
