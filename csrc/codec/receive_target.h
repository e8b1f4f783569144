// What the bulk parts of a message are received to.
#pragma once

#include <memory>
#include <vector>

#include "codec/device_slices.h"
#include "codec/message_format.h"
#include "peer/message.h"

namespace torch_rpc_mpi {

// Used by whoever has the message: by the token's holder until it is complete.
class ReceiveTarget final : public BulkTarget {
 public:
  std::unique_ptr<InboundSlices> slices; // null: all are at the host
  std::vector<char> payload;
  std::vector<at::DataPtr> storages; // of the slices that are not inside the body, in order
  std::vector<size_t> storageBytes;

  // Device memory, unless the transport writes there and not to pinned chunks of the sinks.
  void abandon() noexcept override;

  // device: -1 for the host. Of a message that has slices for devices nothing is refused for want of memory: what is
  // announced comes all the same, and not every sink takes it in the same chunks.
  void add(size_t bytes, int device, size_t piece);
};

// Memory for the bulk parts that `body` describes. devices: null if this agent uses none. Throws BadMessage, NoMemory.
std::unique_ptr<BulkTarget> makeReceiveTarget(
    ConstSpan body,
    const std::shared_ptr<Devices>& devices = nullptr,
    int source = 0);
// Null for a message whose slices are all for the host. Throws BadMessage for one to devices that comes to a worker
// without any.
std::unique_ptr<InboundSlices> slicesFor(const Outline& outline, const std::shared_ptr<Devices>& devices, int source);

} // namespace torch_rpc_mpi
