// Messages on their way out and in, as the exchange sees them: bytes with an owner. What they mean is the codec's.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "peer/frame.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

// What of a part cannot be sent from where it lies, or not yet: it is on a device. Chunks are taken in their order.
class ChunkSource {
 public:
  virtual ~ChunkSource() = default;
  virtual size_t chunks() const = 0;
  // The next chunk, which stays where it is until sent() was called; nothing if it is not there yet. Throws what makes
  // the part impossible to send.
  virtual std::optional<ConstSpan> next() = 0;
  // The transport is done with the first of those chunks for which it was not.
  virtual void sent() = 0;
  // No more chunks are taken: the memory of those that are may go, unless the transport reads there.
  virtual void abandon() noexcept {}
};

// The same for one that is received.
class ChunkSink {
 public:
  virtual ~ChunkSink() = default;
  virtual size_t chunks() const = 0;
  // Where the next chunk is to be received to; nothing if there is no room yet.
  virtual std::optional<MutableSpan> next() = 0;
  // The first of those chunks that had not been received is there. Throws what makes the rest impossible to receive.
  virtual void received() = 0;
  // Whether the transport writes to the memory of the part itself now.
  virtual bool keepsMemory() const {
    return false;
  }
};

// A frame to send, and the larger parts that follow it on the bulk channel, straight from where they lie.
//
// Life: made by any thread; given to the exchange, from then on touched by the token's holder alone; destroyed by
// whoever takes the exchange's finished or failed messages, outside the token, because what it owns may need the GIL.
// One of which MPI may still read parts, to a peer that has failed, is kept for ever, but not its memory.
class OutboundMessage : public Operation {
 public:
  OutboundMessage(int peer, FrameKind kind, uint64_t callId) : peer_(peer) {
    header_.kind = kind;
    header_.callId = callId;
  }

  // Builds the frame, once. Called by the sender's thread when the message can leave at once, else by the token's
  // holder when credit arrives: a waiting message holds no copy of its data. Throws what the codec throws.
  void encode(FramePool& pool);
  bool encoded() const {
    return static_cast<bool>(frame_);
  }
  const FrameBuffer& frame() const {
    return frame_;
  }
  int peer() const {
    return peer_;
  }
  FrameHeader& header() {
    return header_;
  }
  bool needsCredit() const {
    return header_.kind == FrameKind::kRequest;
  }
  // Later than that nobody waits for its answer, and so it is not sent.
  void setDeadline(Clock::time_point deadline) {
    deadline_ = deadline;
  }
  bool late(Clock::time_point now) const {
    return now >= deadline_;
  }
  // Whether the frame holds what it is to hold: what it takes from a device may still be on its way. Asked by the
  // token's holder, once encoded. Throws what makes it impossible to send.
  virtual bool ready() {
    return true;
  }
  // Its frame leaves.
  virtual void leaves() noexcept {}
  // Of a part, counted as planBody() gave them: where its chunks come from, or null if they are sent from memory.
  virtual ChunkSource* sourceOf(size_t /*part*/) {
    return nullptr;
  }
  // Whether destroying it frees nothing but its own buffers.
  virtual bool light() const = 0;
  // It is kept because MPI may still read chunks of it, to a peer that has ended. What it owns but their memory; null
  // for nothing. May throw std::bad_alloc.
  virtual std::unique_ptr<OutboundMessage> releaseSource() {
    return nullptr;
  }
  // After that: the pages of that memory that are not read go back to the system, unless somebody else has that memory
  // as well; returns false if so, and is called again. With the token.
  virtual bool giveBackMemory() noexcept;
  // It will not be sent. Called outside the token.
  virtual void failed(const std::string& reason) noexcept = 0;

  void complete(ProgressToken& token, const OperationStatus& status) noexcept final;

 protected:
  // Sets what of header() the kind needs and says how long the body is …
  virtual size_t planBody(std::vector<ConstSpan>& parts) = 0;
  // … then writes exactly that many bytes.
  virtual void writeBody(char* body) = 0;
  // Whole pages without what is posted.
  void giveBack(void* data, size_t bytes) const noexcept;

 private:
  friend class Outgoing;
  friend class Sending;
  size_t frameBytes() const { // once encoded
    return sizeof(header_) + (header_.bodyInBulk != 0 ? 0 : header_.bodyBytes);
  }
  const int peer_;
  FrameHeader header_;
  Clock::time_point deadline_ = Clock::time_point::max();
  FrameBuffer frame_;
  std::unique_ptr<char[]> separateBody_;  // when it does not fit the frame
  std::vector<ConstSpan> parts_;          // on the bulk channel, a separate body first
  ChunkSource* sourceOfAny(size_t part) { // of parts_
    const size_t before = separateBody_ == nullptr ? 0 : 1;
    return part < before ? nullptr : sourceOf(part - before);
  }
  // Bookkeeping of what goes out, token only.
  class Sending* sending_ = nullptr;
  size_t unfinished_ = 0;         // operations still to complete: the frame, and each chunk
  std::vector<ConstSpan> posted_; // once it is kept: the chunks that MPI may read, by address
};
using OutboundPtr = std::unique_ptr<OutboundMessage>;

// Messages that need nothing more, for whoever destroys them.
struct DoneMessages {
  std::vector<OutboundPtr> sent;                           // or not needed any more
  std::vector<std::pair<OutboundPtr, std::string>> failed; // with the reason
};

// Where the bulk parts of a message are received to; the codec's subclass owns the memory.
class BulkTarget {
 public:
  virtual ~BulkTarget() = default;
  // It is kept, since the transport may still write to it, but nobody will use it: lets go of what the transport does
  // not write to.
  virtual void abandon() noexcept {}
  std::vector<MutableSpan> parts;                // without data: its chunks are dropped
  std::vector<std::unique_ptr<ChunkSink>> sinks; // none, or one for each part, null for those that go to memory
  std::string error;                             // set by a sink, or where there was no memory for a part
};

// A message that has arrived completely.
struct InboundMessage {
  int source = 0;
  FrameHeader header;
  FrameBuffer frame;                    // holds the body …
  std::unique_ptr<char[]> separateBody; // … unless this does
  std::unique_ptr<BulkTarget> target;   // null when there were no bulk parts
  std::string error;                    // it could not be taken in (no memory, a body that makes no sense)

  ConstSpan body() const {
    return {separateBody != nullptr ? separateBody.get() : frame.body(), header.bodyBytes};
  }
};

} // namespace torch_rpc_mpi
