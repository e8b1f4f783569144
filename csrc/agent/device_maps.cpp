#include "agent/device_maps.h"

#include <algorithm>

#include <c10/util/StringUtil.h>

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

const rpc::DeviceMap kNone;

constexpr size_t kCopiedInCurrent = size_t{16} << 10; // bytes: less than a piece, and so copied while it is sent

size_t bytesShown(const std::vector<at::Tensor>& tensors) {
  size_t bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    bytes += tensor.defined() && tensor.layout() == at::kStrided ? tensor.nbytes() : kCopiedInCurrent;
  }
  return bytes;
}

std::string names(const std::vector<c10::Device>& devices) {
  std::string text;
  for (const c10::Device device : devices) {
    text += (text.empty() ? "" : ", ") + device.str();
  }
  return text.empty() ? "none" : text;
}

} // namespace

const rpc::DeviceMap& DeviceMaps::of(int peer) const {
  return maps_.empty() ? kNone : maps_.at(peer).requests;
}

std::shared_ptr<OutboundSlices> DeviceMaps::ofRequest(
    int peer,
    const rpc::Message& message,
    const rpc::DeviceMap& instead) const {
  return slicesOf(peer, message, instead.empty() ? of(peer) : instead, /*isRequest=*/true);
}

std::shared_ptr<OutboundSlices> DeviceMaps::ofResponse(int peer, const rpc::Message& message) const {
  return slicesOf(peer, message, maps_.empty() ? kNone : maps_.at(peer).responses, /*isRequest=*/false);
}

std::shared_ptr<OutboundSlices> DeviceMaps::slicesOf(
    int peer,
    const rpc::Message& message,
    const rpc::DeviceMap& map,
    bool isRequest) const {
  const std::vector<at::Tensor>& tensors = message.tensors();
  if (map.empty() && std::ranges::all_of(tensors, [](const at::Tensor& each) {
        return !each.defined() || each.device().is_cpu() || each.is_meta();
      })) {
    return nullptr;
  }
  std::vector<c10::Device> targets;
  targets.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    const c10::Device device = tensor.defined() ? tensor.device() : c10::Device(c10::kCPU);
    const auto found = map.find(device);
    // In torch's words, which programs may look for.
    TORCH_CHECK(
        found != map.end() || device.is_cpu() || device.is_meta(),
        "The MPI RPC backend only supports CPU tensors by default, please move your tensors to CPU before sending them "
        "over RPC, or call `set_device_map` on `MPIRpcBackendOptions` to explicitly configure device mapping. ",
        isRequest ? "Request" : "Response", " device mapping is not available for destination ",
        members_.describe(peer), ". Could not find device map for device ", device,
        ", but found tensor on device: ", device,
        isRequest ? "" : ". A response goes by the caller's device map for this worker, turned round");
    TORCH_CHECK(
        device.is_cpu() || device.is_meta() || (devices_ != nullptr && devices_->has(device)), "RPC detected that ",
        isRequest ? "an argument" : "a user-function output", " tensor is on device ", device,
        ". This device is not one of the devices that this worker uses for RPC (",
        names(devices_ == nullptr ? std::vector<c10::Device>() : devices_->all()),
        "). Name it in `devices` or in a device map of MPIRpcBackendOptions");
    targets.push_back(found == map.end() ? device : found->second);
  }
  if (!anyOnDevice(tensors, targets)) {
    return nullptr;
  }
  // A response has streams of its own already. Of a small request the copies are in the caller's stream no more than an
  // event there and a wait would be.
  const bool inCurrent = !isRequest || bytesShown(tensors) <= kCopiedInCurrent;
  return std::make_shared<OutboundSlices>(devices_, tensors, std::move(targets), peer, inCurrent);
}

} // namespace torch_rpc_mpi
