// torch's rpc::Message as a frame with bulk parts, and back.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/distributed/rpc/message.h>

#include "codec/device_slices.h"
#include "codec/tensor_codec.h"
#include "peer/message.h"

namespace torch_rpc_mpi {

using RpcMessage = c10::intrusive_ptr<torch::distributed::rpc::Message>;

// Told when a message could not be sent, outside the token.
class SendFailureListener {
 public:
  virtual ~SendFailureListener() = default;
  virtual void onSendFailed(FrameKind kind, int peer, uint64_t callId, const std::string& reason) noexcept = 0;
};

// A request or a response on its way out. `inlineLimit`: slices and payloads up to so many bytes go into the body.
class OutboundRpc final : public OutboundMessage {
 public:
  OutboundRpc(
      int peer,
      FrameKind kind,
      uint64_t callId,
      RpcMessage message,
      size_t inlineLimit,
      SendFailureListener& listener,
      std::shared_ptr<OutboundSlices> onDevices = nullptr);

  bool ready() override {
    return onDevices_ == nullptr || onDevices_->ready();
  }
  void leaves() noexcept override {
    if (onDevices_ != nullptr) {
      onDevices_->leaves();
    }
  }
  ChunkSource* sourceOf(size_t part) override {
    return sources_.empty() ? nullptr : sources_[part].get();
  }
  // After encode(): lets go of the message if everything was copied into the frame.
  void dropSource();
  bool light() const override {
    return message_ == nullptr;
  }
  void failed(const std::string& reason) noexcept override;

 protected:
  size_t planBody(std::vector<ConstSpan>& parts) override;
  void writeBody(char* body) override;

 private:
  bool isLent(size_t slice) const;

  const size_t inlineLimit_;
  SendFailureListener& listener_;
  RpcMessage message_;
  std::unique_ptr<TensorWriter> tensors_;
  std::shared_ptr<OutboundSlices> onDevices_;         // null: no tensor is on one, or is to be
  std::vector<std::unique_ptr<ChunkSource>> sources_; // none, or one for each part, null for what is in memory
  bool anyBulk_ = false;
};

// A control frame (goodbye, drain): a short text or struct as the body.
class OutboundControl final : public OutboundMessage {
 public:
  OutboundControl(int peer, FrameKind kind, std::string body)
      : OutboundMessage(peer, kind, 0),
        body_(std::move(body)) {}
  bool light() const override {
    return true;
  }
  void failed(const std::string&) noexcept override {}

 protected:
  size_t planBody(std::vector<ConstSpan>&) override {
    return body_.size();
  }
  void writeBody(char* body) override {
    std::memcpy(body, body_.data(), body_.size());
  }

 private:
  const std::string body_;
};

// Memory for the bulk parts that `body` describes. devices: null if this agent uses none. Throws BadMessage, NoMemory.
std::unique_ptr<BulkTarget> makeReceiveTarget(
    ConstSpan body,
    const std::shared_ptr<Devices>& devices = nullptr,
    int source = 0);
// The message that has arrived. Throws BadMessage, for bytes that no sender writes; std::invalid_argument for a sparse
// tensor with indices that it does not have; and for what `inbound.error` says, and for want of memory, others.
RpcMessage decodeMessage(InboundMessage inbound);
// The same for an agent that uses devices: with the streams in which its tensors arrive.
struct MessageInStreams {
  RpcMessage message;
  Streams streams;
};
MessageInStreams decodeMessage(InboundMessage inbound, const std::shared_ptr<Devices>& devices);
// What the receiver would decode, without the way there: for calls to oneself, whose arguments are copies as well.
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
