// The receiving end of the bulk channel: what follows a frame, bodies that did not fit it and larger parts. See
// Note [Frames and bulk] in exchange.h.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "peer/message.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

class ExchangeListener;

// Everything is guarded by the progress token but the counts, atomics, which anyone may read.
class BulkReceiver {
 public:
  BulkReceiver(Transport& transport, ExchangeListener& listener, size_t chunkBytes);
  ~BulkReceiver();

  // Receives the rest of a message whose frame has arrived; the listener gets it then. Frames of one peer come here in
  // their order. Returns why nothing can be received from that peer any more, or an empty text.
  std::string receive(ProgressToken& token, InboundMessage message);
  // Messages still under way are never freed: MPI may touch their memory later.
  void close() noexcept;

  uint64_t inFlight() const {
    return inFlight_.load();
  }
  uint64_t bytesReceived() const {
    return bytesReceived_.load();
  }

 private:
  struct ChunkReceive;
  struct Inbound;
  struct Stream;

  void openParts(Inbound& inbound);
  void pump(ProgressToken& token, int source);
  void chunkReceived(ProgressToken& token, Inbound* inbound, const OperationStatus& status);

  Transport& transport_;
  ExchangeListener& listener_;
  const size_t chunkBytes_;
  std::vector<Stream> streams_; // by source
  std::atomic<uint64_t> inFlight_{0}, bytesReceived_{0};
};

} // namespace torch_rpc_mpi
