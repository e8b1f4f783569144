// The frames by which the engines of two ranks talk to each other.
#pragma once

#include <cstring>
#include <string>
#include <utility>

#include "peer/message.h"

namespace torch_rpc_mpi {

// A control frame (goodbye, drain): a short text or struct as the body, or nothing but its header.
class OutboundControl final : public OutboundMessage {
 public:
  OutboundControl(int peer, FrameKind kind, std::string body = {}, uint64_t callId = 0)
      : OutboundMessage(peer, kind, callId),
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

} // namespace torch_rpc_mpi
