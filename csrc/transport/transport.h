// The seam between the protocol and the thing that moves bytes.
//
// Everything above it (frames, credits, bulk streams, draining) is tested in one process against a fake; only
// mpi/mpi_transport.cpp knows that the bytes travel by MPI.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "host/doorbell.h"
#include "transport/progress_token.h"

namespace torch_rpc_mpi {

constexpr int kAnySource = -1;

// Messages on one channel between one pair of ranks keep their order; two channels are independent of each other.
enum class Channel : int { kFrame = 1, kBulk = 2 };

struct OperationStatus {
  int source = kAnySource; // of a receive
  size_t bytes = 0;        // received
  std::string error;       // empty on success; the library's own text otherwise
  bool ok() const {
    return error.empty();
  }
};

// A send or receive under way. The poster owns it and keeps it, and the memory it names, alive until complete() was
// called or the transport was closed.
class Operation {
 public:
  virtual ~Operation() = default;
  // Called exactly once by whoever holds the token; may post further operations. Never throws.
  virtual void complete(ProgressToken& token, const OperationStatus& status) noexcept = 0;
};

// Every call needs the progress token: exactly one thread talks to the transport at any moment.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // Where the thread sleeps that polls. Peers that can do so ring it when they have sent something.
  virtual BellWord& bell() = 0;
  // Whether all of them can: then nothing arrives unrung.
  virtual bool allRing() const = 0;

  virtual void send(ProgressToken& token, int peer, Channel channel, const void* data, size_t bytes, Operation* op) = 0;
  // How many messages on that channel the peer has received of this rank, where it can tell without a message: it
  // shares memory with this one.
  virtual std::optional<uint64_t> taken(ProgressToken& token, int peer, Channel channel) = 0;
  // The peer rings this rank's bell when it has received so many, on both channels together.
  virtual void awaitTaking(ProgressToken& token, int peer, uint64_t messages) = 0;
  // The sources that receives on kFrame are posted for: kAnySource alone, or each peer.
  virtual std::vector<int> frameSources() const = 0;
  // Those of one source complete in the order in which they were posted.
  virtual void receiveFrame(ProgressToken& token, int source, void* data, size_t capacity, Operation* op) = 0;
  virtual void receiveBulk(ProgressToken& token, int peer, void* data, size_t bytes, Operation* op) = 0;
  // Completes what has finished, a bounded batch at a time; returns how many operations that were.
  virtual size_t poll(ProgressToken& token) = 0;
  // The peers whose processes are known to have ended since the last call.
  virtual std::vector<int> takeEnded(ProgressToken& token) = 0;
  // Never touches again what is posted for that peer: none of its operations completes any more, and the poster keeps
  // them and their memory for ever. (Receives from any source stay.)
  virtual void park(ProgressToken& token, int peer) = 0;
  // Cancels posted receives of frames and gives up on all else; no operation completes afterwards. Returns how many of
  // those receives could not be cancelled: their memory may still be written to. Local and bounded. With `agreed` every
  // rank does the same and nothing is in flight, so that the communicator is freed as well.
  virtual size_t close(ProgressToken& token, bool agreed) noexcept = 0;
};

} // namespace torch_rpc_mpi
