#include "codec/inbound_rpc.h"

#include <cstring>

#include <c10/core/StreamGuard.h>

#include "codec/receive_target.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// The payload: as it came on the bulk channel, or out of the body.
std::vector<char> takePayload(const Outline& outline, Reader& body, ReceiveTarget* target) {
  const size_t bytes = outline.head.payloadBytes;
  if (outline.head.payloadInBulk == 0) {
    const char* data = body.take(bytes);
    return std::vector<char>(data, data + bytes);
  }
  if (target == nullptr || target->payload.size() != bytes) {
    throw BadMessage("its payload did not come with it");
  }
  return std::move(target->payload);
}

// The storages of the slices, the last things in the body. What arrived on the bulk channel is taken, in order; what is
// lent is copied from there, the rest out of the body.
std::vector<at::DataPtr> takeStorages(
    const Outline& outline,
    Reader& body,
    ReceiveTarget* target,
    InboundSlices* slices) {
  std::vector<InboundSlices::Copy> toDevices;
  std::vector<at::DataPtr> storages(outline.sizes.size());
  size_t nextBulk = 0;
  for (size_t i = 0; i < storages.size(); ++i) {
    const size_t bytes = outline.sizes[i];
    if (outline.isLent(i)) {
      const SlicePlace& place = outline.places[i];
      require(slices != nullptr && !outline.onHost(i), "device memory is lent for a tensor of the host");
      const c10::Device device = slices->device(place.device);
      slices->checkLent(place.ticket, place.offset, bytes);
      storages[i] = slices->allocate(device, bytes);
      slices->copyLent(place.ticket, place.offset, device, storages[i].get(), bytes);
    } else if (outline.inside[i] && !outline.onHost(i)) {
      const char* data = body.take(bytes);
      const c10::Device device = slices->device(outline.places[i].device);
      storages[i] = slices->allocate(device, bytes);
      toDevices.push_back({device, storages[i].get(), data, bytes});
    } else if (outline.inside[i]) {
      const char* data = body.take(bytes);
      storages[i] = allocateStorage(bytes, /*large=*/false);
      if (bytes > 0) {
        std::memcpy(storages[i].get(), data, bytes);
      }
    } else if (target != nullptr && nextBulk < target->storages.size() && target->storageBytes[nextBulk] == bytes) {
      storages[i] = std::move(target->storages[nextBulk++]);
    } else {
      throw BadMessage("a storage did not come with it");
    }
  }
  body.end();
  if (!toDevices.empty()) {
    slices->copy(toDevices);
  }
  return storages;
}

MessageInStreams decode(InboundMessage& inbound, const std::shared_ptr<Devices>& devices) {
  const ConstSpan whole = inbound.body();
  const size_t skip = inbound.header.bulkParts * sizeof(uint64_t);
  if (skip > whole.bytes) {
    throw BadMessage("it ends early: the sizes of its parts are missing");
  }
  Reader body({whole.data + skip, whole.bytes - skip}, "the body");
  const Outline outline = readOutline(body);
  auto* target = static_cast<ReceiveTarget*>(inbound.target.get());
  std::vector<char> payload = takePayload(outline, body, target);
  std::unique_ptr<InboundSlices> slices =
      target != nullptr ? std::move(target->slices) : slicesFor(outline, devices, inbound.source);
  std::vector<at::DataPtr> storages = takeStorages(outline, body, target, slices.get());
  if (slices != nullptr) {
    slices->endLoans();
  }
  Streams streams = slices != nullptr ? slices->streams() : devices != nullptr ? devices->poolStreams() : Streams();
  const c10::MultiStreamGuard guard(streams); // of what is made of the components of sparse tensors
  Reader descriptions(outline.descriptions, "the description of its tensors");
  auto tensors = readTensors(descriptions, outline.head.tensors, std::move(storages), outline.sizes);
  auto message = c10::make_intrusive<rpc::Message>(
      std::move(payload), std::move(tensors), static_cast<rpc::MessageType>(inbound.header.messageType),
      static_cast<int64_t>(inbound.header.callId));
  return {std::move(message), std::move(streams)};
}

} // namespace

RpcMessage decodeMessage(InboundMessage inbound) {
  return decodeMessage(std::move(inbound), nullptr).message;
}

MessageInStreams decodeMessage(InboundMessage inbound, const std::shared_ptr<Devices>& devices) {
  const auto whose = [&inbound] {
    return c10::str(
        "message ", inbound.header.callId, " of rank ", inbound.source, " (type ", inbound.header.messageType, ", ",
        inbound.header.bodyBytes, " bytes and ", inbound.header.bulkParts, " parts)");
  };
  if (!inbound.error.empty()) {
    throw std::runtime_error(whose() + ": " + inbound.error);
  }
  try {
    return decode(inbound, devices);
  } catch (const BadMessage& error) {
    throw BadMessage(
        c10::str(
            whose(), " makes no sense: ", error.what(),
            ". No user's program can cause this: it is an error of torch_rpc_mpi, or of the MPI that carried it"));
  }
}

} // namespace torch_rpc_mpi
