// What a worker sends to itself: what the receiver would decode, without the way there.
#pragma once

#include <functional>
#include <vector>

#include "codec/device_slices.h"
#include "codec/rpc_message.h"

namespace torch_rpc_mpi {

RpcMessage copyMessage(const torch::distributed::rpc::Message& message);
// The same for a message with tensors that are on devices, or are to be. What comes from one to the host is there when
// all the `awaited` events are complete, and finish() has been called; nothing if nothing does.
struct OwnCopy {
  RpcMessage message;
  Streams streams;
  std::vector<DeviceEvent> awaited;
  std::function<void()> finish;
};
OwnCopy copyMessage(const torch::distributed::rpc::Message& message, const OutboundSlices& onDevices);

} // namespace torch_rpc_mpi
