#include "codec/message_codec.h"

#include <c10/core/StreamGuard.h>

#include "base/error_text.h"
#include "host/no_memory.h"
#include "host/resources.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// The head of a body. Behind it: the sizes of all slices (uint64_t each, the top bit set for those inside the body),
// where the slices are and are to be if any is on a device or is to be on one, the tickets of lent device memory, the
// tensor descriptions, the payload unless it is a bulk part, the slices that are inside.
struct BodyHead {
  uint64_t payloadBytes;
  uint64_t descriptionBytes;
  uint32_t tensors;
  uint32_t slices;
  uint32_t payloadInBulk;
  uint16_t placed; // 1: there are places
  uint16_t tickets;
};

// Of a slice at the receiver.
struct SlicePlace {
  int32_t device = -1; // none: its host
  uint32_t ticket = 0; // of the memory that it lies in, counted from 1; kTicketsFollow: of its chunks; 0: none
  uint64_t offset = 0; // in that memory; kTicketsFollow: bytes of each piece
};
constexpr uint32_t kTicketsFollow = UINT32_MAX;

constexpr uint64_t kInside = uint64_t{1} << 63;

// What is read from a body without touching its data.
struct Outline {
  BodyHead head;
  std::vector<size_t> sizes;
  std::vector<bool> inside;
  std::vector<SlicePlace> places; // none: all at the host
  std::vector<Ticket> tickets;
  bool onHost(size_t slice) const {
    return places.empty() || places[slice].device < 0;
  }
  bool isLent(size_t slice) const {
    return !places.empty() && places[slice].ticket != 0 && places[slice].ticket != kTicketsFollow;
  }
  bool isBulk(size_t slice) const {
    return !inside[slice] && !isLent(slice);
  }
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
  if (outline.head.placed != 0) {
    require(outline.head.slices <= reader.left() / sizeof(SlicePlace), "it ends early");
    for (size_t i = 0; i < outline.sizes.size(); ++i) {
      outline.places.push_back(reader.get<SlicePlace>());
    }
  }
  require(outline.head.tickets <= kTickets, "it lends more than there is");
  for (size_t i = 0; i < outline.head.tickets; ++i) {
    outline.tickets.push_back(reader.get<Ticket>());
  }
  outline.descriptions = {reader.take(outline.head.descriptionBytes), outline.head.descriptionBytes};
  return outline;
}

// What is inside the body has to be there, and nothing else: a body that announces other parts than its frame does, or
// was cut, must not be told apart only when what follows it has been received to the wrong places.
void checkInside(const Outline& outline, uint64_t left) {
  require(outline.head.payloadInBulk <= 1 && outline.head.placed <= 1, "its head is none");
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
  std::unique_ptr<InboundSlices> slices; // null: all are at the host
  std::vector<char> payload;
  std::vector<at::DataPtr> storages; // of the slices that are not inside the body, in order
  std::vector<size_t> storageBytes;

  // Device memory, unless the transport writes there and not to pinned chunks of the sinks.
  void abandon() noexcept override {
    for (size_t i = 0; i < storages.size(); ++i) {
      if (!storages[i].device().is_cpu() && !sinks[sinks.size() - storages.size() + i]->keepsMemory()) {
        storages[i].clear();
      }
    }
  }

  // device: -1 for the host. Of a message that has slices for devices nothing is refused for want of memory: what is
  // announced comes all the same, and not every sink takes it in the same chunks.
  void add(size_t bytes, int device, size_t piece) {
    at::DataPtr memory;
    std::unique_ptr<ChunkSink> sink;
    try {
      if (device < 0) {
        memory = allocateStorage(bytes, /*large=*/true);
      } else {
        memory = slices->allocate(slices->device(device), bytes);
      }
    } catch (const std::bad_alloc& failure) {
      if (slices == nullptr) {
        throw;
      }
      error = errorText(failure);
    }
    auto* const data = static_cast<char*>(memory.get());
    if (device >= 0) {
      sink = slices->sinkFor(slices->device(device), data, bytes, piece);
    }
    storages.push_back(std::move(memory));
    storageBytes.push_back(bytes);
    parts.push_back({data, bytes});
    if (slices != nullptr) {
      sinks.push_back(std::move(sink));
    }
  }
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

// Throws BadMessage for a message to devices that comes to a worker without any.
std::unique_ptr<InboundSlices> slicesFor(const Outline& outline, const std::shared_ptr<Devices>& devices, int source) {
  if (std::ranges::all_of(outline.places, [](const SlicePlace& place) { return place.device < 0; })) {
    require(outline.tickets.empty(), "it lends device memory for tensors of the host");
    return nullptr;
  }
  require(devices != nullptr, "its tensors are for devices, of which this worker uses none");
  auto slices = std::make_unique<InboundSlices>(devices, source);
  for (const Ticket& ticket : outline.tickets) {
    slices->borrow(ticket);
  }
  return slices;
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
    SendFailureListener& listener,
    std::shared_ptr<OutboundSlices> onDevices)
    : OutboundMessage(peer, kind, callId),
      inlineLimit_(inlineLimit),
      listener_(listener),
      message_(std::move(message)),
      onDevices_(std::move(onDevices)) {
  header().messageType = static_cast<uint32_t>(message_->type());
  header().chargedBytes = kind == FrameKind::kRequest ? chargeOf(*message_, inlineLimit) : 0;
}

size_t OutboundRpc::planBody(std::vector<ConstSpan>& parts) {
  tensors_ = std::make_unique<TensorWriter>();
  if (onDevices_ == nullptr) {
    tensors_->add(message_->tensors());
  } else {
    const c10::MultiStreamGuard guard(onDevices_->streams()); // of the copies that it makes
    tensors_->add(message_->tensors(), onDevices_->targets());
    onDevices_->begin(*tensors_, inlineLimit_);
  }
  const std::vector<char>& payload = message_->payload();
  size_t body = sizeof(BodyHead) + tensors_->descriptions().size();
  if (onDevices_ != nullptr) {
    header().tickets = static_cast<uint8_t>(onDevices_->tickets().size());
    body += tensors_->slices().size() * sizeof(SlicePlace) + header().tickets * sizeof(Ticket);
  }
  if (payload.size() > inlineLimit_) {
    parts.push_back({payload.data(), payload.size()});
  } else {
    body += payload.size();
  }
  sources_.resize(onDevices_ == nullptr ? 0 : parts.size());
  for (size_t i = 0; i < tensors_->slices().size(); ++i) {
    const ConstSpan slice = tensors_->slices()[i];
    body += sizeof(uint64_t);
    if (isLent(i)) {
      continue;
    }
    if (slice.bytes <= inlineLimit_) {
      body += slice.bytes;
      continue;
    }
    parts.push_back(slice);
    if (onDevices_ != nullptr) {
      sources_.push_back(onDevices_->sourceOf(*tensors_, i));
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
  head.placed = onDevices_ == nullptr ? 0 : 1;
  head.tickets = header().tickets;
  write(&head, sizeof(head));
  for (size_t i = 0; i < slices.size(); ++i) {
    const uint64_t size = slices[i].bytes | (slices[i].bytes > inlineLimit_ || isLent(i) ? 0 : kInside);
    write(&size, sizeof(size));
  }
  for (size_t i = 0; head.placed != 0 && i < slices.size(); ++i) {
    const c10::Device there = tensors_->whereabouts()[i].there;
    SlicePlace place;
    place.device = there.is_cpu() ? -1 : there.index();
    place.ticket = onDevices_->wayOf(i) == OutboundSlices::Way::kTickets ? kTicketsFollow : onDevices_->ticketOf(i);
    place.offset = place.ticket == kTicketsFollow ? onDevices_->pieceOf(i) : isLent(i) ? onDevices_->offsetOf(i) : 0;
    write(&place, sizeof(place));
  }
  for (size_t i = 0; i < head.tickets; ++i) {
    write(&onDevices_->tickets()[i], sizeof(Ticket));
  }
  write(tensors_->descriptions().data(), tensors_->descriptions().size());
  if (head.payloadInBulk == 0) {
    write(payload.data(), payload.size());
  }
  for (size_t i = 0; i < slices.size(); ++i) {
    if (onDevices_ != nullptr && onDevices_->wayOf(i) == OutboundSlices::Way::kGathered) {
      onDevices_->placeAt(i, body);
      body += slices[i].bytes;
    } else if (!isLent(i) && slices[i].bytes <= inlineLimit_) {
      write(slices[i].data, slices[i].bytes);
    }
  }
}

bool OutboundRpc::isLent(size_t slice) const {
  return onDevices_ != nullptr && onDevices_->wayOf(slice) == OutboundSlices::Way::kLent;
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
  if (message_ == nullptr) { // everything was copied, see dropSource()
    return nullptr;
  }
  auto source = std::make_unique<Source>(peer(), header().kind, header().callId);
  for (const auto& chunks : sources_) {
    if (chunks != nullptr) {
      chunks->abandon();
    }
  }
  storages_ = tensors_->storages();
  payload_ = std::move(*message_).movePayload(); // which stays where it lies
  source->message = std::move(message_);
  source->tensors = std::move(tensors_);
  return source;
}

bool OutboundRpc::giveBackMemory() noexcept {
  if (std::ranges::any_of(storages_, [](const c10::Storage& storage) { return storage.use_count() > 1; })) {
    return false;
  }
  for (const c10::Storage& storage : storages_) {
    if (isOfStorageAlone(storage.data_ptr())) {
      giveBack(storage.mutable_data(), storage.nbytes());
    }
  }
  giveBack(payload_.data(), payload_.size());
  return OutboundMessage::giveBackMemory();
}

// ---- receiving ----

std::unique_ptr<BulkTarget> makeReceiveTarget(ConstSpan body, const std::shared_ptr<Devices>& devices, int source) {
  Reader reader(body, "the body");
  const Outline outline = readOutline(reader);
  checkInside(outline, reader.left());
  auto target = std::make_unique<ReceiveTarget>();
  if (outline.head.payloadInBulk != 0) {
    try {
      target->payload = payloadOf(outline.head.payloadBytes);
    } catch (const NoMemory& failure) {
      if (outline.places.empty()) {
        throw;
      }
      target->error = failure.what(); // as in add()
    }
    target->parts.push_back({target->payload.empty() ? nullptr : target->payload.data(), outline.head.payloadBytes});
  }
  target->slices = slicesFor(outline, devices, source);
  target->sinks.resize(target->slices == nullptr ? 0 : target->parts.size());
  for (size_t i = 0; i < outline.sizes.size(); ++i) {
    if (outline.isBulk(i)) {
      const bool onHost = outline.onHost(i);
      const bool tickets = !onHost && outline.places[i].ticket == kTicketsFollow;
      require(!tickets || outline.places[i].offset > 0, "it lends nothing");
      require(onHost || outline.sizes[i] > 0, "a part for a device is empty");
      target->add(outline.sizes[i], onHost ? -1 : outline.places[i].device, tickets ? outline.places[i].offset : 0);
    }
  }
  return target;
}

namespace {

// What arrived on the bulk channel is taken, in order; the rest is copied out of the body.
MessageInStreams decode(InboundMessage& inbound, const std::shared_ptr<Devices>& devices) {
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
  std::unique_ptr<InboundSlices> slices =
      target != nullptr ? std::move(target->slices) : slicesFor(outline, devices, inbound.source);
  std::vector<InboundSlices::Copy> toDevices;
  std::vector<at::DataPtr> storages(outline.sizes.size());
  size_t nextBulk = 0;
  for (size_t i = 0; i < storages.size(); ++i) {
    if (outline.isLent(i)) {
      require(slices != nullptr && !outline.onHost(i), "device memory is lent for a tensor of the host");
      const c10::Device device = slices->device(outline.places[i].device);
      slices->checkLent(outline.places[i].ticket, outline.places[i].offset, outline.sizes[i]);
      storages[i] = slices->allocate(device, outline.sizes[i]);
      slices->copyLent(outline.places[i].ticket, outline.places[i].offset, device, storages[i].get(), outline.sizes[i]);
    } else if (outline.inside[i]) {
      const char* data = reader.take(outline.sizes[i]);
      if (!outline.onHost(i)) {
        const c10::Device device = slices->device(outline.places[i].device);
        storages[i] = slices->allocate(device, outline.sizes[i]);
        toDevices.push_back({device, storages[i].get(), data, outline.sizes[i]});
        continue;
      }
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
  if (!toDevices.empty()) {
    slices->copy(toDevices);
  }
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
