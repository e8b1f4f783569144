// Any bytes as the body of a message that has arrived: each is decoded, and read to the end, or refused.
#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "codec/inbound_rpc.h"
#include "codec/receive_target.h"
#include "tensor_reading.h"

using namespace torch_rpc_mpi;

namespace {

constexpr size_t kMostBytesOfParts = size_t{1} << 16; // more says nothing that fewer do not

// As Incoming receives them: what the body says is where they go. Their data are the body's, again and again.
std::unique_ptr<BulkTarget> receiveParts(ConstSpan body, uint32_t parts) {
  const size_t skip = parts * sizeof(uint64_t);
  auto target = makeReceiveTarget({body.data + skip, body.bytes - skip});
  size_t bytes = 0;
  for (const MutableSpan& part : target->parts) {
    bytes += part.bytes;
    if (part.bytes > kMostBytesOfParts || bytes > kMostBytesOfParts) {
      throw std::bad_alloc();
    }
    for (size_t i = 0; i < part.bytes; ++i) {
      part.data[i] = body.data[i % body.bytes];
    }
  }
  return target;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) {
    return 0;
  }
  InboundMessage message;
  message.source = 3;
  message.header.bulkParts = data[0] % 4;
  message.header.messageType = data[1];
  message.header.bodyBytes = size - 2;
  if (message.header.bulkParts > message.header.bodyBytes / sizeof(uint64_t)) {
    return 0; // parseFrame() lets no such frame through
  }
  message.separateBody.reset(new char[size - 2]); // so that its end is the end of memory
  std::memcpy(message.separateBody.get(), data + 2, size - 2);
  const bool hasParts = message.header.bulkParts > 0;
  try {
    if (hasParts) {
      message.target = receiveParts(message.body(), message.header.bulkParts);
    }
    const RpcMessage decoded = decodeMessage(std::move(message));
    for (const at::Tensor& tensor : decoded->tensors()) {
      try {
        testing::readAll(tensor);
      } catch (const c10::Error&) { // an operator of torch does not take such a tensor
      }
    }
  } catch (const BadMessage& error) {
    check::that(
        hasParts || std::strstr(error.what(), "of rank 3") != nullptr, "the error names the source", __FILE__,
        __LINE__);
  } catch (const std::invalid_argument&) { // a sparse tensor with indices that it does not have
  } catch (const std::bad_alloc&) {
  }
  return 0;
}
