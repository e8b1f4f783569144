// The transfer protocol: frames, credits and bulk streams between this rank and every other.
//
// Note [Frames and bulk]
// ~~~~~~~~~~~~~~~~~~~~~~
// A message is one frame; what does not fit follows on the bulk channel, which is one ordered stream of chunks for each
// pair of ranks. Both sides cut every part into chunks of the same size and post them in the order of their frames, so
// that chunks need no names. The receiver posts a few chunks at a time: a large transfer then yields to small frames
// after each chunk, although MPI may copy a whole chunk inside one call. Parts are sent from the tensors' own storage
// and received into the storage that the callee's tensor will own.
// How much may be under way: Note [Credits] in credits.h.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "peer/bulk_receiver.h"
#include "peer/credits.h"
#include "peer/message.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

struct ExchangeOptions {
  size_t eagerLimit = 16384;             // bytes of a body that always fits a frame
  size_t bulkChunk = size_t{1} << 20;    // bytes
  size_t windowRequests = 256;           // requests with one peer that it has not begun to run
  size_t windowBytes = size_t{16} << 20; // their bytes

  size_t frameBytes() const; // what a frame takes in memory, however small its message
};

// What the layer above hears. Called by the token's holder: it notes what happened and may post messages.
class ExchangeListener {
 public:
  virtual ~ExchangeListener() = default;
  // Finds memory for the bulk parts that `body` (of a request or response) describes. May throw: the parts are then
  // received into nothing, and the message arrives with the error.
  virtual std::unique_ptr<BulkTarget> makeTarget(int source, const FrameHeader& header, ConstSpan body) = 0;
  virtual void onMessage(ProgressToken& token, InboundMessage message) = 0;
  virtual void onBadFrame(int source, const std::string& reason) = 0;
  // The peer left or failed: messages to it are refused from now on.
  virtual void onPeerGone(ProgressToken& token, int peer, const std::string& reason) = 0;
};

struct ExchangeCounts {
  uint64_t framesSent = 0; // without drain frames, as the others
  uint64_t framesReceived = 0;
  uint64_t bytesSent = 0; // frames and bulk
  uint64_t bytesReceived = 0;
  uint64_t waitingForCredit = 0;
  uint64_t bulkInFlight = 0; // parts being sent or received
  uint64_t unfinishedSends = 0;
};

// Everything is guarded by the progress token but: the counters of counts_ and Peer::waitingCount (atomics, read by
// anyone), and credits_ and bulkReceiver_, which say for themselves.
class Exchange {
 public:
  Exchange(Transport& transport, ExchangeListener& listener, ExchangeOptions options);
  ~Exchange();

  FramePool& frames() {
    return *frames_;
  }
  // Posts the first receives.
  void start(ProgressToken& token);
  // Sends, queues or refuses; refused ones appear in failed().
  void post(ProgressToken& token, OutboundPtr message);
  // One bounded turn; returns whether anything moved.
  bool poll(ProgressToken& token);
  // Tells peers of credit that no frame has told them of for a while.
  void reportStaleCredits(ProgressToken& token, std::chrono::steady_clock::time_point now);
  void close(ProgressToken& token, bool agreed) noexcept;
  // No message to `peer` will be sent or waited for any more.
  void dropPeer(ProgressToken& token, int peer, const std::string& reason);

  // What left the exchange since the last call: to be destroyed, or told that it failed, outside the token.
  std::vector<OutboundPtr> takeFinished(ProgressToken& token);
  std::vector<std::pair<OutboundPtr, std::string>> takeFailed(ProgressToken& token);

  // Any thread: a request of `source` left the queue to be run.
  void released(int source, uint64_t chargedBytes) {
    credits_.released(source, chargedBytes);
  }
  // Any thread, a hint: a request of so many bytes would leave at once.
  bool wouldSendAtOnce(int peer, uint64_t chargedBytes) const;
  bool hasDue() const {
    return credits_.hasDue();
  }
  ExchangeCounts counts() const;
  // Nothing under way in either direction, as far as this side knows.
  bool quiet(ProgressToken& token) const;

 private:
  friend class OutboundMessage;
  struct FrameReceive;
  struct ChunkSend;
  struct Peer;

  void transmit(ProgressToken& token, OutboundPtr message);
  void finished(ProgressToken& token, OutboundMessage* message);
  void sendFailed(ProgressToken& token, int peer, const std::string& reason);
  void sendWaiting(ProgressToken& token, int peer);
  void reportCredits(ProgressToken& token, const std::vector<int>& ranks); // in frames of their own, if still needed
  void pumpOut(ProgressToken& token, int peer);
  void onFrame(ProgressToken& token, FrameBuffer frame, const OperationStatus& status);
  void postFrameReceive(ProgressToken& token, FrameReceive* slot);

  Transport& transport_;
  ExchangeListener& listener_;
  const ExchangeOptions options_;
  const std::shared_ptr<FramePool> frames_;
  Credits credits_;
  BulkReceiver bulkReceiver_;
  std::vector<std::unique_ptr<FrameReceive>> receives_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<OutboundPtr> finished_;
  std::vector<std::pair<OutboundPtr, std::string>> failed_;
  std::string fatal_; // what broke the transport; thrown by the next poll()
  bool closed_ = false;

  struct AtomicCounts {
    std::atomic<uint64_t> framesSent{0}, framesReceived{0}, bytesSent{0}, bytesReceived{0};
    std::atomic<uint64_t> waitingForCredit{0}, bulkInFlight{0}, unfinishedSends{0};
  } counts_;
};

} // namespace torch_rpc_mpi
