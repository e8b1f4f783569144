// What is on its way from any thread to the token's holder: messages, and peers to be failed.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "codec/outbound_rpc.h"
#include "engine/engine.h"
#include "peer/exchange.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards queue_, of which filled_ is a hint; spare_ is the token's; the rest is immutable.
class Outbox {
 public:
  // engine: there when the first message comes.
  Outbox(Exchange& exchange, const std::shared_ptr<Engine>& engine, size_t inlineLimit)
      : exchange_(exchange),
        engine_(engine),
        inlineLimit_(inlineLimit) {}

  // A message that submit() takes, not encoded yet. `listener` is told if it could not be sent.
  std::unique_ptr<OutboundRpc> make(
      int peer,
      FrameKind kind,
      uint64_t callId,
      RpcMessage message,
      SendFailureListener& listener,
      std::shared_ptr<OutboundSlices> onDevices = nullptr) const {
    return std::make_unique<OutboundRpc>(
        peer, kind, callId, std::move(message), inlineLimit_, listener, std::move(onDevices));
  }
  // Now, in this thread: what it holds then is a copy, but for its larger tensors.
  void encode(OutboundRpc& message) const;
  // expectsReply: somebody has to poll for the answer.
  void submit(OutboundPtr message, bool expectsReply);
  // A message of this peer makes no sense: Exchange::refuse().
  void refuse(int peer, const std::string& why) noexcept;

  // Of the token's holder.
  bool filled() const {
    return filled_.load();
  }
  // lastTurn: calls whose time was over by then have been given up, or are about to be, and their requests are not
  // sent. Returns whether there was something.
  bool post(ProgressToken& token, Clock::time_point lastTurn);

 private:
  Exchange& exchange_;
  const std::shared_ptr<Engine>& engine_;
  const size_t inlineLimit_;

  std::mutex mutex_;
  std::vector<OutboundPtr> queue_;
  std::atomic<bool> filled_{false};
  std::vector<OutboundPtr> spare_; // the token's: empty, so that a turn need not allocate memory for what it takes
};

} // namespace torch_rpc_mpi
