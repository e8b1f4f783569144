// A frame with bulk parts as torch's rpc::Message again.
#pragma once

#include <memory>

#include "codec/device_slices.h"
#include "codec/rpc_message.h"
#include "peer/message.h"

namespace torch_rpc_mpi {

// The message that has arrived. Throws BadMessage, for bytes that no sender writes; std::invalid_argument for a sparse
// tensor with indices that it does not have; and for what `inbound.error` says, and for want of memory, others.
RpcMessage decodeMessage(InboundMessage inbound);
// The same for an agent that uses devices: with the streams in which its tensors arrive.
struct MessageInStreams {
  RpcMessage message;
  Streams streams;
};
MessageInStreams decodeMessage(InboundMessage inbound, const std::shared_ptr<Devices>& devices);
} // namespace torch_rpc_mpi
