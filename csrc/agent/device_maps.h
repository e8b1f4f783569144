// Which device of a peer a tensor goes to.
#pragma once

#include <memory>
#include <vector>

#include "agent/agent_options.h"
#include "agent/membership.h"
#include "codec/device_slices.h"

namespace torch_rpc_mpi {

// What TensorPipe's agent does: requests go by the maps of this worker's options, responses by the callers' turned
// round. Immutable.
class DeviceMaps {
 public:
  using DeviceMap = torch::distributed::rpc::DeviceMap;

  DeviceMaps(const Membership& members, std::shared_ptr<Devices> devices, const std::vector<DeviceMapOfPeer>& maps)
      : members_(members),
        devices_(std::move(devices)),
        maps_(maps) {}

  const std::shared_ptr<Devices>& devices() const { // null: this worker uses none
    return devices_;
  }
  const DeviceMap& of(int peer) const;
  // Of what this thread sends. Null if all tensors are on the CPU and stay there. `instead` of the peer's map, unless
  // it is empty. Throws c10::Error for a tensor on a device that has no map.
  std::shared_ptr<OutboundSlices> ofRequest(
      int peer,
      const torch::distributed::rpc::Message& message,
      const DeviceMap& instead) const;
  // Also for a tensor on a device that this worker does not use.
  std::shared_ptr<OutboundSlices> ofResponse(int peer, const torch::distributed::rpc::Message& message) const;

 private:
  std::shared_ptr<OutboundSlices> slicesOf(
      int peer,
      const torch::distributed::rpc::Message& message,
      const DeviceMap& map,
      bool isRequest) const;

  const Membership& members_;
  const std::shared_ptr<Devices> devices_;
  const std::vector<DeviceMapOfPeer>& maps_; // by rank, or none
};

} // namespace torch_rpc_mpi
