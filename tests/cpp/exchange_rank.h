// Exchanges over the fake network, each with what it heard.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fake_transport.h"
#include "host/no_memory.h"
#include "peer/exchange.h"

namespace torch_rpc_mpi::testing {

// A message whose body is a text and whose parts are byte strings.
class TextMessage final : public OutboundMessage {
 public:
  TextMessage(int peer, FrameKind kind, std::string text, std::vector<std::string> parts = {})
      : OutboundMessage(peer, kind, 7),
        text_(std::move(text)),
        parts_(std::move(parts)) {
    if (kind == FrameKind::kRequest) {
      header().chargedBytes = text_.size();
      for (const std::string& part : parts_) {
        header().chargedBytes += part.size();
      }
    }
  }
  bool light() const override {
    return false;
  }
  void failed(const std::string& reason) noexcept override {
    lastFailure = reason;
  }
  static inline std::string lastFailure;
  bool refuseToEncode = false;

 protected:
  size_t planBody(std::vector<ConstSpan>& parts) override {
    if (refuseToEncode) {
      throw std::runtime_error("cannot be encoded");
    }
    for (const std::string& part : parts_) {
      parts.push_back({part.data(), part.size()});
    }
    return text_.size();
  }
  void writeBody(char* body) override {
    std::copy(text_.begin(), text_.end(), body);
  }

 private:
  const std::string text_;
  const std::vector<std::string> parts_;
};

class TextTarget final : public BulkTarget {
 public:
  std::vector<std::string> memory;
};

// One rank: an exchange over the fake, and what it heard.
struct Rank : ExchangeListener {
  Rank(
      const std::shared_ptr<FakeNetwork>& network,
      int rank,
      ExchangeOptions options,
      std::vector<int> sources = {kAnySource})
      : transport(network, rank),
        exchange(transport, *this, options),
        hold(tokens) {
    transport.sources = std::move(sources);
    exchange.start(*hold);
  }
  ~Rank() override {
    exchange.close(*hold, true);
  }
  std::unique_ptr<BulkTarget> makeTarget(int, const FrameHeader& header, ConstSpan body) override {
    if (refuseTargets) {
      throw NoMemory("a tensor", 5000);
    }
    if (misunderstands) {
      throw std::runtime_error("it ends early");
    }
    auto target = std::make_unique<TextTarget>();
    const auto* sizes = reinterpret_cast<const uint64_t*>(body.data - header.bulkParts * sizeof(uint64_t));
    for (uint32_t i = 0; i < header.bulkParts; ++i) {
      target->memory.emplace_back(sizes[i], '\0');
    }
    for (std::string& memory : target->memory) {
      target->parts.push_back({memory.data(), memory.size()});
    }
    return target;
  }
  void onMessage(ProgressToken&, InboundMessage&& message) override {
    const size_t skip = message.header.bulkParts * sizeof(uint64_t);
    const ConstSpan body = message.body();
    kinds.push_back(message.header.kind);
    bodies.emplace_back(body.data + skip, body.bytes - skip);
    errors.push_back(message.error);
    parts.push_back(
        message.target != nullptr ? static_cast<TextTarget&>(*message.target).memory : std::vector<std::string>{});
    if (message.header.kind == FrameKind::kRequest) {
      charged.push_back(message.header.chargedBytes);
    }
  }
  void onStrayFrame(int source, const std::string& reason) override {
    strayFrames.push_back(std::to_string(source) + ": " + reason);
  }
  std::string failureText(int peer, const std::string& cause) const override {
    return "peer " + std::to_string(peer) + ": " + cause;
  }
  void onPeerEnded(ProgressToken&, int, const std::string& reason) override {
    ended.push_back(reason);
  }
  void post(OutboundPtr message) {
    exchange.post(*hold, std::move(message));
  }
  bool poll() {
    const bool moved = exchange.poll(*hold);
    const DoneMessages done = exchange.takeDone(*hold);
    sent += done.sent.size();
    for (const auto& [message, reason] : done.failed) {
      message->failed(reason);
      ++failures;
    }
    return moved;
  }

  FakeTransport transport;
  Exchange exchange;
  TokenSource tokens;
  TokenHold hold;
  bool refuseTargets = false;
  bool misunderstands = false;
  int failures = 0;
  size_t sent = 0; // messages
  std::vector<std::string> bodies, errors, strayFrames, ended;
  std::vector<std::vector<std::string>> parts;
  std::vector<uint64_t> charged;
  std::vector<FrameKind> kinds;
};

struct Pair {
  explicit Pair(ExchangeOptions options = smallOptions())
      : network(std::make_shared<FakeNetwork>(2)),
        a(network, 0, options),
        b(network, 1, options) {}
  static ExchangeOptions smallOptions() {
    ExchangeOptions options;
    options.eagerLimit = 64;
    options.bulkChunk = 1000;
    return options;
  }
  void settle() {
    while (a.poll() | b.poll()) {
    }
  }
  std::shared_ptr<FakeNetwork> network;
  Rank a, b;
};

inline std::string pattern(size_t bytes, int seed) {
  std::string text(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i) {
    text[i] = static_cast<char>((i * 31 + static_cast<size_t>(seed) * 7) % 251);
  }
  return text;
}

inline OutboundPtr request(std::string text, std::vector<std::string> parts = {}) {
  return std::make_unique<TextMessage>(1, FrameKind::kRequest, std::move(text), std::move(parts));
}

// One that takes no credit for bytes.
inline OutboundPtr smallRequest(std::string text) {
  OutboundPtr message = request(std::move(text));
  message->header().chargedBytes = 0;
  return message;
}

} // namespace torch_rpc_mpi::testing
