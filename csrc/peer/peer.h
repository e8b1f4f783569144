// One other rank, as this one deals with it.
#pragma once

#include <atomic>
#include <chrono>
#include <string>

#include "base/clock.h"
#include "peer/credit.h"
#include "peer/incoming.h"
#include "peer/outgoing.h"

namespace torch_rpc_mpi {

// Note [States of a peer]
// ~~~~~~~~~~~~~~~~~~~~~~~
//   open ── its goodbye ─> leaving ── what it had sent has arrived, or kLeavingLimit is over ─> gone
//   open or leaving ── anything else that ends it ─> failed
//
// Whatever ends a peer (a goodbye, a process that ended, an error of the transport, a frame that makes no sense) comes
// to Peer::end(), and the first reason sticks. It is one transition for both directions:
// - what waits to be sent to it fails with the reason, and so does what is posted later;
// - what is posted is parked: the transport never touches it again, and the memory that MPI might still read or write
// is
//   kept;
// - what still arrives from it is dropped and counted;
// - the listener hears of it once, and fails the calls that wait for its answers.
// While it is leaving, nothing is sent to it, but answers that are on their way are received.
// No other peer is affected.
//
// Everything is guarded by the progress token but state(), an atomic, and what Credit and Outgoing say of themselves.
class Peer {
 public:
  enum class State : uint8_t { kOpen, kLeaving, kGone, kFailed };
  using Time = Clock::time_point;

  Peer(int rank, PeerContext& context, PeerFailureListener& owner)
      : rank_(rank),
        context_(context),
        credit(context.options.windowRequests, context.options.windowBytes),
        outgoing(rank, credit, context, owner),
        incoming(rank, context, owner) {}

  State state() const { // any thread
    return state_.load();
  }
  bool ended() const {
    return state() >= State::kGone;
  }
  const std::string& reason() const {
    return reason_;
  }
  // Its goodbye has arrived.
  void leaves(ProgressToken& token, const std::string& reason, Time now);
  // Whether it is leaving and there is nothing more to wait for.
  bool hasLeft(Time now) const;
  // kGone or kFailed, once. The reason is that of the first event, also of a goodbye before.
  void end(ProgressToken& token, State state, const std::string& reason);

 private:
  const int rank_;
  PeerContext& context_;
  std::atomic<State> state_{State::kOpen};
  std::string reason_;
  Time leavingSince_;

 public:
  Credit credit;
  Outgoing outgoing;
  Incoming incoming;
};

} // namespace torch_rpc_mpi
