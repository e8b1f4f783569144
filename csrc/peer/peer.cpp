#include "peer/peer.h"

namespace torch_rpc_mpi {

namespace {

// A rank that leaves gives what it has sent half a second to arrive (kFlushLimit in agent/leaving.cpp).
constexpr auto kLeavingLimit = std::chrono::milliseconds(800);

} // namespace

void Peer::leaves(ProgressToken& token, const std::string& reason, Time now) {
  if (state() != State::kOpen) {
    return;
  }
  reason_ = reason;
  leavingSince_ = now;
  state_ = State::kLeaving;
  outgoing.abandon(token, reason);
}

bool Peer::hasLeft(Time now) const {
  return state() == State::kLeaving && (incoming.unfinished() == 0 || now - leavingSince_ > kLeavingLimit);
}

void Peer::end(ProgressToken& token, State state, const std::string& reason) {
  if (ended()) {
    return;
  }
  if (reason_.empty()) {
    reason_ = reason;
  }
  state_ = state;
  outgoing.abandon(token, reason_);
  incoming.abandon();
  context_.transport.park(token, rank_);
  context_.listener.onPeerEnded(token, rank_, reason_);
}

} // namespace torch_rpc_mpi
