// What goes out to one peer: requests that wait for credit, frames, and the bulk streams behind them.
#pragma once

#include <atomic>
#include <deque>
#include <string>

#include "peer/credit.h"
#include "peer/peer_context.h"

namespace torch_rpc_mpi {

// Everything is guarded by the progress token but Lane::count, an atomic.
class Outgoing {
 public:
  Outgoing(int rank, Credit& credit, PeerContext& context, PeerFailureListener& owner);

  // Sends, or queues for want of credit.
  void post(ProgressToken& token, OutboundPtr message);
  // A frame that is nothing but its header.
  void reportCredit(ProgressToken& token);
  // Sends what the peer's credit now allows.
  void sendWaiting(ProgressToken& token);
  // Any thread, a hint: a request of so many bytes would leave at once.
  bool wouldSendAtOnce(uint64_t chargedBytes) const;
  // The peer takes no more. What waits fails with the reason; what was posted is left to the transport, which parks it.
  void abandon(ProgressToken& token, const std::string& reason);

 private:
  friend class OutboundMessage;
  struct ChunkSend;
  struct Lane {
    std::deque<OutboundPtr> waiting; // for credit
    std::atomic<size_t> count{0};
  };
  struct Stream {
    OutboundMessage* message;
    size_t part;
    size_t offset;
  };

  Lane& laneOf(uint64_t chargedBytes) {
    return chargedBytes == 0 ? small_ : large_;
  }
  size_t chunksOf(size_t bytes) const;
  void transmit(ProgressToken& token, OutboundPtr message);
  void pump(ProgressToken& token);
  void sendChunk(ProgressToken& token);
  // So many of a message's operations are complete, or will never be posted; `error`: the transport's, if they failed.
  void operationDone(ProgressToken& token, OutboundMessage& message, size_t operations, const std::string& error);
  void cutStreams(ProgressToken& token);

  const int rank_;
  Credit& credit_;
  PeerContext& context_;
  PeerFailureListener& owner_;
  Lane large_, small_;
  std::deque<Stream> streams_;
  size_t chunksOut_ = 0;
  size_t unfinished_ = 0; // messages
  size_t partsOut_ = 0;   // messages with bulk parts
  bool pumping_ = false;  // an operation that completes inside send() must not recurse
  bool abandoned_ = false;
};

} // namespace torch_rpc_mpi
