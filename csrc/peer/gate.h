// Whether the next frame or chunk to one peer may be posted now, and how the exchange learns that it is to ask again.
#pragma once

#include <utility>

#include "peer/peer_context.h"
#include "peer/window.h"

namespace torch_rpc_mpi {

// Everything is guarded by the progress token.
class Gate {
 public:
  Gate(int rank, PeerContext& context)
      : rank_(rank),
        context_(context),
        window_(rank, context.transport, context.windows) {}

  // If not, the exchange calls Outgoing::tryAgain() later.
  bool allows(ProgressToken& token, Channel channel) {
    if (window_.allows(token, channel)) {
      return true;
    }
    framesBlocked_ = framesBlocked_ || channel == Channel::kFrame;
    if (!std::exchange(blocked_, true)) {
      context_.blocked.push_back(rank_);
    }
    window_.await(token);
    return false;
  }
  void posted(Channel channel) {
    window_.posted(channel);
  }
  // By the window: the next ones get in line.
  bool framesBlocked() const {
    return framesBlocked_;
  }
  void askAgain() {
    blocked_ = false;
    framesBlocked_ = false;
  }

  // Something is not ready: the exchange calls Outgoing::tryDevice() in each turn.
  void awaitDevice() {
    if (!std::exchange(atDevice_, true)) {
      context_.atDevice.push_back(rank_);
    }
  }
  bool awaitsDevice() const {
    return atDevice_;
  }
  void askDevice() {
    atDevice_ = false;
  }

 private:
  const int rank_;
  PeerContext& context_;
  Window window_;
  bool framesBlocked_ = false;
  bool blocked_ = false;  // named in PeerContext::blocked
  bool atDevice_ = false; // named in PeerContext::atDevice
};

} // namespace torch_rpc_mpi
