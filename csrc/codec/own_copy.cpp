#include "codec/own_copy.h"

#include <cstring>

#include <c10/core/StreamGuard.h>

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// From and to pinned memory, as a copy between a device and other memory of the host waits for the device.
class OwnCopier {
 public:
  OwnCopier(const TensorWriter& writer, const OutboundSlices& onDevices)
      : writer_(writer),
        onDevices_(onDevices),
        devices_(onDevices.devices()),
        streams_(devices_.poolStreams()) {}

  at::DataPtr copy(size_t slice) {
    const ConstSpan from = writer_.slices()[slice];
    const auto [here, there] = writer_.whereabouts()[slice];
    at::DataPtr memory = there.is_cpu() ? allocateStorage(from.bytes, from.bytes >= size_t{64} << 10)
                                        : devices_.allocate(streamOf(streams_, there), from.bytes);
    if (from.bytes == 0) {
      return memory;
    }
    if (here.is_cpu() && there.is_cpu()) {
      std::memcpy(memory.get(), from.data, from.bytes);
    } else if (here.is_cpu()) {
      auto block = std::make_shared<PinnedBlock>(devices_.pinned(there, from.bytes));
      std::memcpy(block->data(), from.data, from.bytes);
      DeviceEvent copied = copyIn(streamOf(streams_, there), memory.get(), block->data(), from.bytes);
      devices_.holdUntil(std::move(copied), std::move(block));
    } else if (there.is_cpu()) {
      auto block = std::make_shared<PinnedBlock>(devices_.pinned(here, from.bytes));
      awaited_.push_back(copyIn(streamOf(onDevices_.streams(), here), block->data(), from.data, from.bytes));
      toHost_.push_back({memory.get(), std::move(block), from.bytes});
    } else { // in the stream of the receiver's device
      const c10::Stream& source = streamOf(onDevices_.streams(), here);
      const c10::Stream& stream = streamOf(streams_, there);
      devices_.order(source, stream);
      (void)copyIn(stream, memory.get(), from.data, from.bytes);
      devices_.order(stream, source); // which the memory is kept for
    }
    return memory;
  }

  OwnCopy finish(RpcMessage message) {
    OwnCopy copy;
    copy.message = std::move(message);
    copy.streams = streams_;
    copy.awaited = std::move(awaited_);
    copy.finish = [copies = std::move(toHost_)] {
      for (const ToHost& each : copies) {
        std::memcpy(each.memory, each.block->data(), each.bytes);
      }
    };
    return copy;
  }
  const Streams& streams() const {
    return streams_;
  }

 private:
  struct ToHost {
    void* memory;
    std::shared_ptr<PinnedBlock> block;
    size_t bytes;
  };
  DeviceEvent copyIn(const c10::Stream& stream, void* to, const void* from, size_t bytes) {
    const OnDevice onDevice(devices_.runtime(), stream.device_index());
    devices_.runtime().copy(to, from, bytes, devices_.runtime().handleOf(stream));
    DeviceEvent event = devices_.event(stream.device());
    event.record(devices_.runtime().handleOf(stream));
    return event;
  }

  const TensorWriter& writer_;
  const OutboundSlices& onDevices_;
  Devices& devices_;
  const Streams streams_;
  std::vector<DeviceEvent> awaited_;
  std::vector<ToHost> toHost_;
};

// The message with tensors over these storages, which hold its slices.
RpcMessage copyOver(const rpc::Message& message, const TensorWriter& writer, std::vector<at::DataPtr> storages) {
  std::vector<size_t> sizes;
  for (const ConstSpan& slice : writer.slices()) {
    sizes.push_back(slice.bytes);
  }
  Reader descriptions({writer.descriptions().data(), writer.descriptions().size()}, "the description of its tensors");
  auto tensors = readTensors(descriptions, message.tensors().size(), std::move(storages), sizes);
  auto payload = message.payload();
  return c10::make_intrusive<rpc::Message>(std::move(payload), std::move(tensors), message.type(), message.id());
}

} // namespace

RpcMessage copyMessage(const rpc::Message& message) {
  TensorWriter writer;
  writer.add(message.tensors());
  std::vector<at::DataPtr> storages;
  for (const ConstSpan& slice : writer.slices()) {
    storages.push_back(allocateStorage(slice.bytes, slice.bytes >= size_t{64} << 10));
    if (slice.bytes > 0) {
      std::memcpy(storages.back().get(), slice.data, slice.bytes);
    }
  }
  return copyOver(message, writer, std::move(storages));
}

OwnCopy copyMessage(const rpc::Message& message, const OutboundSlices& onDevices) {
  TensorWriter writer;
  {
    const c10::MultiStreamGuard guard(onDevices.streams());
    writer.add(message.tensors(), onDevices.targets());
  }
  OwnCopier copier(writer, onDevices);
  std::vector<at::DataPtr> storages;
  for (size_t i = 0; i < writer.slices().size(); ++i) {
    storages.push_back(copier.copy(i));
  }
  const c10::MultiStreamGuard guard(copier.streams());
  return copier.finish(copyOver(message, writer, std::move(storages)));
}

} // namespace torch_rpc_mpi
