// What comes in from one peer on the bulk channel: bodies that did not fit their frame, and larger parts. See
// Note [Frames and bulk] in exchange.h.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "peer/peer_context.h"

namespace torch_rpc_mpi {

// Everything is guarded by the progress token.
class Incoming {
 public:
  Incoming(int rank, PeerContext& context, PeerFailureListener& owner);
  ~Incoming();

  // Receives the rest of a message whose frame has arrived; the listener gets it then. Frames come here in their order.
  // Throws when nothing can be received any more.
  void receive(ProgressToken& token, InboundMessage&& message);
  // What waits for room at a device; returns whether something moved.
  bool tryDevice(ProgressToken& token);
  // Nothing more is received. Memory that MPI may touch is kept until it has, or for ever, but without its pages.
  void abandon() noexcept;
  bool awaitsDevice() const {
    return atDevice_;
  }
  // Whether not all of a message of this kind and id is here.
  bool lacksPartOf(FrameKind kind, uint64_t callId) const;
  // Messages whose frame has arrived, but not all of the rest.
  size_t unfinished() const {
    return unfinished_;
  }

 private:
  struct ChunkReceive;
  struct Message;

  void openParts(Message& message);
  bool pump(ProgressToken& token); // whether a receive was posted
  void chunkReceived(
      ProgressToken& token,
      Message* message,
      std::optional<size_t> expected,
      const OperationStatus& status);
  void complete(ProgressToken& token, Message* message);

  const int rank_;
  PeerContext& context_;
  PeerFailureListener& owner_;
  std::deque<std::unique_ptr<Message>> messages_; // those not all of which is posted, in the order of their frames
  std::vector<Message*> receiving_;               // with chunks that are posted and not complete
  size_t chunksIn_ = 0;                           // those
  size_t unfinished_ = 0;
  bool atDevice_ = false; // named in PeerContext::atDevice
  bool abandoned_ = false;
};

} // namespace torch_rpc_mpi
