// What the parts of a peer share: the transport, the limits, and whom they tell.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "peer/message.h"
#include "peer/window.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

struct ExchangeOptions {
  size_t eagerLimit = 16384;             // bytes of a body that always fits a frame
  size_t bulkChunk = size_t{1} << 20;    // bytes
  size_t windowRequests = 256;           // requests with one peer that it has not begun to run; see Note [Credit]
  size_t windowBytes = size_t{16} << 20; // their bytes
  // Messages that neighbours have not taken: see Note [Untaken messages]. Of the 64 cells that MPICH has, the others
  // are for what MPI itself sends, and for goodbyes.
  size_t untakenBudget = 48;

  size_t frameBytes() const; // what a frame takes in memory, however small its message
};

// What the layer above hears. Called by the token's holder: it notes what happened and may post messages.
class ExchangeListener {
 public:
  virtual ~ExchangeListener() = default;
  // Finds memory for the bulk parts that `body` (of a request or response) describes. Throws std::bad_alloc: the parts
  // are then received into nothing, and the message arrives with the error; or what else is wrong, which fails the
  // peer.
  virtual std::unique_ptr<BulkTarget> makeTarget(int source, const FrameHeader& header, ConstSpan body) = 0;
  virtual void onMessage(ProgressToken& token, InboundMessage&& message) = 0;
  // A frame of nobody that is known.
  virtual void onStrayFrame(int source, const std::string& reason) = 0;
  // The words of an error: who failed, and why.
  virtual std::string failureText(int peer, const std::string& cause) const = 0;
  // The peer is gone or has failed; see Note [States of a peer]. Once for each.
  virtual void onPeerEnded(ProgressToken& token, int peer, const std::string& reason) = 0;
};

// Counters that anyone may read.
struct ExchangeCounters {
  std::atomic<uint64_t> framesSent{0}, framesReceived{0}, framesDropped{0}; // without drain frames
  std::atomic<uint64_t> bytesSent{0}, bytesReceived{0};                     // frames and bulk
  std::atomic<uint64_t> waitingForCredit{0};
  std::atomic<uint64_t> partsOut{0}, partsIn{0}; // messages whose bulk parts are being sent or received
  std::atomic<uint64_t> waitingUntaken{0};       // answers and control frames, see Note [Untaken messages]
  std::atomic<uint64_t> waitingForDevice{0};     // messages that are not ready
  std::atomic<uint64_t> unfinishedSends{0};
  bool allSent() const { // but for requests that wait
    return waitingUntaken == 0 && unfinishedSends == 0 && waitingForDevice == 0;
  }
};

// One for an exchange, used under the progress token but for the counters.
struct PeerContext {
  Transport& transport;
  ExchangeListener& listener;
  const ExchangeOptions& options;
  FramePool& frames;
  ExchangeCounters& counters;
  DoneMessages& done;
  WindowBudget& windows;
  std::vector<OutboundMessage*>& kept; // see OutboundMessage::giveBackMemory()
  std::vector<int>& blocked;           // peers for which something waits until they take more; room for all
  std::vector<int>& atDevice;          // peers for which, or of which, something waits for a device; room for all
};

// Whom the parts of a peer tell that it has failed.
class PeerFailureListener {
 public:
  virtual ~PeerFailureListener() = default;
  virtual void onPeerFailed(ProgressToken& token, int rank, const std::string& reason) noexcept = 0;
};

} // namespace torch_rpc_mpi
