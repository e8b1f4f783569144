// What goes out to one peer: messages that wait for credit, until it has taken others, or for a device, and what leaves
// in a batch. From then on they are in Sending.
#pragma once

#include <cstdint>
#include <deque>
#include <string>

#include "peer/credit.h"
#include "peer/gate.h"
#include "peer/peer_context.h"
#include "peer/sending.h"
#include "peer/waiting.h"

namespace torch_rpc_mpi {

// Everything is guarded by the progress token but what Waiting says of itself.
class Outgoing {
 public:
  Outgoing(int rank, Credit& credit, PeerContext& context, PeerFailureListener& owner);

  // Sends, or queues: for want of credit, or because the peer has not taken enough of what it was sent.
  void post(ProgressToken& token, OutboundPtr message);
  // A frame that is nothing but its header. Not while others wait, which report as well, or else the next look does.
  void reportCredit(ProgressToken& token);
  // Sends what the peer's credit and its window now allow; returns whether there was something.
  bool sendWaiting(ProgressToken& token);
  // The same, of one that was named in PeerContext::blocked and is not any more.
  bool tryAgain(ProgressToken& token);
  // What waits for a device; returns whether something moved.
  bool tryDevice(ProgressToken& token);
  // A goodbye that waits passes all that it waits behind.
  void sendGoodbye(ProgressToken& token);
  // Whether a request waits here to be sent.
  bool holdsRequest(uint64_t callId) const {
    return waiting_.holdsRequest(callId);
  }
  // Whether it waits for a device.
  bool stagesRequest(uint64_t callId) const {
    return findStaged(callId) != staged_.end();
  }
  // Any thread, a hint: a request of so many bytes would leave at once.
  bool wouldSendAtOnce(uint64_t chargedBytes) const;
  // Nobody waits any more for the answer to this call: it is given back, or the peer is told.
  OutboundPtr forget(ProgressToken& token, uint64_t callId);
  // The peer takes no more. What waits fails with the reason; what was posted is left to the transport, which parks it.
  void abandon(ProgressToken& token, const std::string& reason);
  bool awaitsDevice() const {
    return gate_.awaitsDevice();
  }

 private:
  // Of messages that are charged. false: it is ready.
  bool stage(OutboundPtr& message);
  void hold(OutboundPtr& message); // until it is. Throws std::bad_alloc, and it stays where it is
  void failCharged(OutboundPtr message, const std::string& error);
  void send(ProgressToken& token, OutboundPtr message);
  std::string encode(OutboundMessage& message); // why it cannot be, or nothing
  void charge(const OutboundMessage& message);
  void giveBackCredit(const OutboundMessage& message); // one that was charged is not sent
  std::deque<OutboundPtr>::const_iterator findStaged(uint64_t callId) const;
  OutboundPtr takeStaged(uint64_t callId);
  OutboundPtr gather(OutboundPtr first);
  void addTo(OutboundMessage& batch, OutboundPtr message);

  const int rank_;
  Credit& credit_;
  PeerContext& context_;
  Gate gate_;
  Sending sending_;
  Waiting waiting_;
  std::deque<OutboundPtr> staged_; // encoded and charged, but not ready
};

} // namespace torch_rpc_mpi
