// torch's rpc::Message as a frame with bulk parts.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "codec/device_slices.h"
#include "codec/rpc_message.h"
#include "codec/tensor_codec.h"
#include "peer/message.h"

namespace torch_rpc_mpi {

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
    return message_ == nullptr && storages_.empty();
  }
  void failed(const std::string& reason) noexcept override;
  OutboundPtr releaseSource() override;
  bool giveBackMemory() noexcept override;

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
  // Once the source is released: in what its parts lie.
  std::vector<c10::Storage> storages_;
  std::vector<char> payload_;
};

} // namespace torch_rpc_mpi
