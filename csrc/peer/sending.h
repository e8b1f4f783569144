// What the transport sends to one peer: frames, and behind them bulk streams in chunks, until it is done with them.
#pragma once

#include <cstddef>
#include <deque>
#include <string>
#include <vector>

#include "peer/credit.h"
#include "peer/gate.h"
#include "peer/peer_context.h"

namespace torch_rpc_mpi {

// Everything is guarded by the progress token.
class Sending {
 public:
  Sending(int rank, Credit& credit, PeerContext& context, Gate& gate, PeerFailureListener& owner);

  // Of a message that is encoded and has its credit.
  void transmit(ProgressToken& token, OutboundPtr message);
  // Of one that leaves in a batch, whose frame has it now.
  void sentInBatch(OutboundPtr message);
  // Chunks, as many as may go now; returns whether one did.
  bool pump(ProgressToken& token);
  // The peer takes no more. What was posted is left to the transport, which parks it.
  void abandon(ProgressToken& token);

 private:
  friend class OutboundMessage;
  struct ChunkSend;
  struct Stream {
    OutboundMessage* message;
    size_t part;
    size_t offset; // bytes, or chunks of a source
  };

  size_t chunksOf(OutboundMessage& message, size_t part, size_t offset = 0) const;
  void count(const FrameHeader& header);
  bool sendChunk(ProgressToken& token); // false: it is not there yet
  // So many of a message's operations are complete, or will never be posted; `error`: the transport's, if they failed.
  void operationDone(ProgressToken& token, OutboundMessage& message, size_t operations, const std::string& error);
  void letGo(OutboundPtr message); // nothing more is to be done for it
  void keep();
  void cutStreams(ProgressToken& token);

  const int rank_;
  Credit& credit_;
  PeerContext& context_;
  Gate& gate_;
  PeerFailureListener& owner_;
  std::deque<Stream> streams_;
  std::vector<const ChunkSend*> chunks_;    // posted and not complete
  size_t unfinished_ = 0;                   // messages
  std::vector<OutboundMessage*> withParts_; // of the unfinished ones
  bool pumping_ = false;                    // an operation that completes inside send() must not recurse
  bool abandoned_ = false;
};

} // namespace torch_rpc_mpi
