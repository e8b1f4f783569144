// Any bytes as the body of a message that has arrived: each is decoded, and read to the end, or refused. It may have
// come to a worker with devices.
#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "check.h"
#include "codec/inbound_rpc.h"
#include "codec/receive_target.h"
#include "host_device.h"

using namespace torch_rpc_mpi;

namespace {

constexpr size_t kMostBytesOfParts = size_t{1} << 16; // more says nothing that fewer do not

// As Incoming receives them: what the body says is where they go. Their data are the body's, again and again.
std::unique_ptr<BulkTarget> receiveParts(
    ConstSpan body,
    uint32_t parts,
    const std::shared_ptr<Devices>& devices,
    int source) {
  const size_t skip = parts * sizeof(uint64_t);
  auto target = makeReceiveTarget({body.data + skip, body.bytes - skip}, devices, source);
  size_t bytes = 0;
  for (size_t i = 0; i < target->parts.size(); ++i) {
    const MutableSpan& part = target->parts[i];
    bytes += part.bytes;
    if (part.bytes > kMostBytesOfParts || bytes > kMostBytesOfParts) {
      throw std::bad_alloc();
    }
    const auto fill = [&](MutableSpan with) {
      for (size_t at = 0; at < with.bytes; ++at) {
        with.data[at] = body.data[at % body.bytes];
      }
    };
    ChunkSink* const sink = target->sinks.empty() ? nullptr : target->sinks[i].get();
    if (sink == nullptr) {
      fill(part);
      continue;
    }
    for (size_t left = sink->chunks(); left > 0; --left) {
      std::optional<MutableSpan> chunk;
      while (!(chunk = sink->next())) { // those before are being copied
        (void)devices->poll();
      }
      fill(*chunk);
      sink->received();
    }
  }
  return target;
}

// Reads it to the end, or it is refused.
void decode(InboundMessage message, const std::shared_ptr<Devices>& devices) {
  const bool hasParts = message.header.bulkParts > 0;
  try {
    if (hasParts) {
      message.target = receiveParts(message.body(), message.header.bulkParts, devices, message.source);
    }
    const MessageInStreams decoded = decodeMessage(std::move(message), devices);
    for (const at::Tensor& tensor : decoded.message->tensors()) {
      fuzz::readAll(tensor);
    }
  } catch (const BadMessage& error) {
    check::that(
        hasParts || std::strstr(error.what(), "of rank 3") != nullptr, "the error names the source", __FILE__,
        __LINE__);
  } catch (const std::invalid_argument&) { // a sparse tensor with indices that it does not have
  } catch (const std::bad_alloc&) {
  }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) {
    return 0;
  }
  InboundMessage message;
  message.source = 3;
  message.header.bulkParts = data[0] % 4;
  message.header.tickets = (data[0] >> 3) % 4;
  const auto devices = (data[0] & 4) != 0 ? fuzz::makeDevices(message.source + 1) : nullptr;
  message.header.messageType = data[1];
  message.header.bodyBytes = size - 2;
  if (message.header.bulkParts > message.header.bodyBytes / sizeof(uint64_t)) {
    return 0; // parseFrame() lets no such frame through
  }
  message.separateBody.reset(new char[size - 2]); // so that its end is the end of memory
  std::memcpy(message.separateBody.get(), data + 2, size - 2);
  decode(std::move(message), devices);
  if (devices != nullptr) {
    devices->close(); // as an agent does; else what it holds would keep it
    CHECK_EQUAL(fuzz::deviceAllocations(), 0U);
  }
  return 0;
}
