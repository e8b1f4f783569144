#include "codec/outbound_rpc.h"

#include <algorithm>
#include <cstring>

#include <c10/core/StreamGuard.h>

#include "codec/message_format.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

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

} // namespace torch_rpc_mpi
