#include "codec/message_codec.h"

#include "host/no_memory.h"
#include "host/resources.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// The head of a body. Behind it: the sizes of all slices (uint64_t each, the top bit set for those inside the body),
// the tensor descriptions, the payload unless it is a bulk part, the slices that are inside.
struct BodyHead {
  uint64_t payloadBytes;
  uint64_t descriptionBytes;
  uint32_t tensors;
  uint32_t slices;
  uint32_t payloadInBulk;
  uint32_t reserved;
};

constexpr uint64_t kInside = uint64_t{1} << 63;

// What is read from a body without touching its data.
struct Outline {
  BodyHead head;
  std::vector<size_t> sizes;
  std::vector<bool> inside;
  ConstSpan descriptions;
};

Outline readOutline(Reader& reader) {
  Outline outline{};
  outline.head = reader.get<BodyHead>();
  if (outline.head.slices > reader.left() / sizeof(uint64_t)) {
    throw BadMessage(
        c10::str(
            "it ends early: it announces ", outline.head.slices, " storages, and ", reader.left(),
            " bytes are left for their sizes"));
  }
  outline.sizes.resize(outline.head.slices);
  outline.inside.resize(outline.head.slices);
  for (size_t i = 0; i < outline.sizes.size(); ++i) {
    const auto size = reader.get<uint64_t>();
    outline.inside[i] = (size & kInside) != 0;
    outline.sizes[i] = size & ~kInside;
  }
  outline.descriptions = {reader.take(outline.head.descriptionBytes), outline.head.descriptionBytes};
  return outline;
}

// What is inside the body has to be there, and nothing else: a body that announces other parts than its frame does, or
// was cut, must not be told apart only when what follows it has been received to the wrong places.
void checkInside(const Outline& outline, uint64_t left) {
  require(outline.head.payloadInBulk <= 1 && outline.head.reserved == 0, "its head is none");
  const auto take = [&left](uint64_t bytes) {
    require(bytes <= left, "it ends early");
    left -= bytes;
  };
  if (outline.head.payloadInBulk == 0) {
    take(outline.head.payloadBytes);
  }
  for (size_t i = 0; i < outline.sizes.size(); ++i) {
    if (outline.inside[i]) {
      take(outline.sizes[i]);
    }
  }
  require(left == 0, "it is longer than it says");
}

class ReceiveTarget final : public BulkTarget {
 public:
  std::vector<char> payload;
  std::vector<at::DataPtr> storages; // of the slices that are not inside the body, in order
  std::vector<size_t> storageBytes;
};

// It is filled with zeros: of more than there is, that would end the process.
std::vector<char> payloadOf(size_t bytes) {
  constexpr const char* kWhat = "the payload of a message";
  if (bytes > size_t{1} << 30 && bytes > usableMemory()) {
    throw NoMemory(kWhat, bytes);
  }
  try {
    return std::vector<char>(bytes);
  } catch (const std::bad_alloc&) {
    throw NoMemory(kWhat, bytes);
  }
}

// What a request takes of the receiver's byte credit, roughly: nothing if it is small, or else its payload and the
// bytes that its tensors show.
size_t chargeOf(const rpc::Message& request, size_t inlineLimit) {
  size_t bytes = request.payload().size();
  for (const at::Tensor& tensor : request.tensors()) {
    if (tensor.defined() && tensor.layout() == at::kStrided) {
      bytes += static_cast<size_t>(tensor.numel()) * tensor.itemsize();
    } else if (tensor.defined()) {
      bytes += inlineLimit + 1; // sparse, and so not small; counting it would cost more than the error
    }
  }
  return bytes > inlineLimit ? bytes : 0;
}

} // namespace

// ---- sending ----

OutboundRpc::OutboundRpc(
    int peer,
    FrameKind kind,
    uint64_t callId,
    RpcMessage message,
    size_t inlineLimit,
    SendFailureListener& listener)
    : OutboundMessage(peer, kind, callId),
      inlineLimit_(inlineLimit),
      listener_(listener),
      message_(std::move(message)) {
  header().messageType = static_cast<uint32_t>(message_->type());
  header().chargedBytes = kind == FrameKind::kRequest ? chargeOf(*message_, inlineLimit) : 0;
}

size_t OutboundRpc::planBody(std::vector<ConstSpan>& parts) {
  tensors_ = std::make_unique<TensorWriter>();
  tensors_->add(message_->tensors());
  const std::vector<char>& payload = message_->payload();
  size_t body = sizeof(BodyHead) + tensors_->descriptions().size();
  if (payload.size() > inlineLimit_) {
    parts.push_back({payload.data(), payload.size()});
  } else {
    body += payload.size();
  }
  for (const ConstSpan& slice : tensors_->slices()) {
    body += sizeof(uint64_t);
    if (slice.bytes > inlineLimit_) {
      parts.push_back(slice);
    } else {
      body += slice.bytes;
    }
  }
  anyBulk_ = !parts.empty();
  return body;
}

void OutboundRpc::writeBody(char* body) {
  const auto write = [&body](const void* data, size_t bytes) {
    if (bytes > 0) {
      std::memcpy(body, data, bytes);
      body += bytes;
    }
  };
  const std::vector<char>& payload = message_->payload();
  const std::vector<ConstSpan>& slices = tensors_->slices();
  BodyHead head{};
  head.payloadBytes = payload.size();
  head.descriptionBytes = tensors_->descriptions().size();
  head.tensors = static_cast<uint32_t>(message_->tensors().size());
  head.slices = static_cast<uint32_t>(slices.size());
  head.payloadInBulk = payload.size() > inlineLimit_ ? 1 : 0;
  write(&head, sizeof(head));
  for (const ConstSpan& slice : slices) {
    const uint64_t size = slice.bytes | (slice.bytes > inlineLimit_ ? 0 : kInside);
    write(&size, sizeof(size));
  }
  write(tensors_->descriptions().data(), tensors_->descriptions().size());
  if (head.payloadInBulk == 0) {
    write(payload.data(), payload.size());
  }
  for (const ConstSpan& slice : slices) {
    if (slice.bytes <= inlineLimit_) {
      write(slice.data, slice.bytes);
    }
  }
}

void OutboundRpc::dropSource() {
  if (!anyBulk_) {
    message_.reset();
    tensors_.reset();
  }
}

void OutboundRpc::failed(const std::string& reason) noexcept {
  listener_.onSendFailed(header().kind, peer(), header().callId, reason);
}

OutboundPtr OutboundRpc::releaseSource() {
  struct Source final : OutboundMessage {
    using OutboundMessage::OutboundMessage;
    bool light() const override {
      return false;
    }
    void failed(const std::string&) noexcept override {}
    size_t planBody(std::vector<ConstSpan>&) override {
      return 0;
    }
    void writeBody(char*) override {}
    RpcMessage message;
    std::unique_ptr<TensorWriter> tensors;
  };
  auto source = std::make_unique<Source>(peer(), header().kind, header().callId);
  storages_ = tensors_->storages();
  payload_ = std::move(*message_).movePayload(); // which stays where it lies
  source->message = std::move(message_);
  source->tensors = std::move(tensors_);
  return source;
}

bool OutboundRpc::giveBackMemory() noexcept {
  (void)OutboundMessage::giveBackMemory();
  giveBack(payload_.data(), payload_.size());
  const auto done = [&](const c10::Storage& storage) {
    if (storage.use_count() > 1) {
      return false;
    }
    if (isOfStorageAlone(storage.data_ptr())) {
      giveBack(storage.mutable_data(), storage.nbytes());
    }
    return true;
  };
  return std::ranges::count_if(storages_, done) == std::ssize(storages_);
}

// ---- receiving ----

std::unique_ptr<BulkTarget> makeReceiveTarget(ConstSpan body) {
  Reader reader(body, "the body");
  const Outline outline = readOutline(reader);
  checkInside(outline, reader.left());
  auto target = std::make_unique<ReceiveTarget>();
  if (outline.head.payloadInBulk != 0) {
    target->payload = payloadOf(outline.head.payloadBytes);
    target->parts.push_back({target->payload.data(), target->payload.size()});
  }
  for (size_t i = 0; i < outline.sizes.size(); ++i) {
    if (!outline.inside[i]) {
      target->storages.push_back(allocateStorage(outline.sizes[i], /*large=*/true));
      target->storageBytes.push_back(outline.sizes[i]);
      target->parts.push_back({static_cast<char*>(target->storages.back().get()), outline.sizes[i]});
    }
  }
  return target;
}

namespace {

// What arrived on the bulk channel is taken, in order; the rest is copied out of the body.
RpcMessage decode(InboundMessage& inbound) {
  const ConstSpan body = inbound.body();
  const size_t skip = inbound.header.bulkParts * sizeof(uint64_t);
  if (skip > body.bytes) {
    throw BadMessage("it ends early: the sizes of its parts are missing");
  }
  Reader reader({body.data + skip, body.bytes - skip}, "the body");
  const Outline outline = readOutline(reader);
  auto* target = static_cast<ReceiveTarget*>(inbound.target.get());
  std::vector<char> payload;
  if (outline.head.payloadInBulk == 0) {
    const char* data = reader.take(outline.head.payloadBytes);
    payload.assign(data, data + outline.head.payloadBytes);
  } else if (target != nullptr && target->payload.size() == outline.head.payloadBytes) {
    payload = std::move(target->payload);
  } else {
    throw BadMessage("its payload did not come with it");
  }
  std::vector<at::DataPtr> storages(outline.sizes.size());
  size_t nextBulk = 0;
  for (size_t i = 0; i < storages.size(); ++i) {
    if (outline.inside[i]) {
      const char* data = reader.take(outline.sizes[i]);
      storages[i] = allocateStorage(outline.sizes[i], /*large=*/false);
      if (outline.sizes[i] > 0) {
        std::memcpy(storages[i].get(), data, outline.sizes[i]);
      }
    } else if (
        target != nullptr && nextBulk < target->storages.size() && target->storageBytes[nextBulk] == outline.sizes[i]) {
      storages[i] = std::move(target->storages[nextBulk++]);
    } else {
      throw BadMessage("a storage did not come with it");
    }
  }
  reader.end();
  Reader descriptions(outline.descriptions, "the description of its tensors");
  auto tensors = readTensors(descriptions, outline.head.tensors, std::move(storages), outline.sizes);
  return c10::make_intrusive<rpc::Message>(
      std::move(payload), std::move(tensors), static_cast<rpc::MessageType>(inbound.header.messageType),
      static_cast<int64_t>(inbound.header.callId));
}

} // namespace

RpcMessage decodeMessage(InboundMessage inbound) {
  const auto whose = [&inbound] {
    return c10::str(
        "message ", inbound.header.callId, " of rank ", inbound.source, " (type ", inbound.header.messageType, ", ",
        inbound.header.bodyBytes, " bytes and ", inbound.header.bulkParts, " parts)");
  };
  if (!inbound.error.empty()) {
    throw std::runtime_error(whose() + ": " + inbound.error);
  }
  try {
    return decode(inbound);
  } catch (const BadMessage& error) {
    throw BadMessage(
        c10::str(
            whose(), " makes no sense: ", error.what(),
            ". No user's program can cause this: it is an error of torch_rpc_mpi, or of the MPI that carried it"));
  }
}

RpcMessage copyMessage(const rpc::Message& message) {
  TensorWriter writer;
  writer.add(message.tensors());
  std::vector<at::DataPtr> storages;
  std::vector<size_t> sizes;
  for (const ConstSpan& slice : writer.slices()) {
    storages.push_back(allocateStorage(slice.bytes, slice.bytes >= size_t{64} << 10));
    sizes.push_back(slice.bytes);
    if (slice.bytes > 0) {
      std::memcpy(storages.back().get(), slice.data, slice.bytes);
    }
  }
  Reader descriptions({writer.descriptions().data(), writer.descriptions().size()}, "the description of its tensors");
  auto tensors = readTensors(descriptions, message.tensors().size(), std::move(storages), sizes);
  auto payload = message.payload();
  return c10::make_intrusive<rpc::Message>(std::move(payload), std::move(tensors), message.type(), message.id());
}

} // namespace torch_rpc_mpi
