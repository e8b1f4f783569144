#include "peer/outgoing.h"

#include <algorithm>
#include <new>
#include <utility>

#include "base/error_text.h"
#include "base/flight_recorder.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kChunksOut = 4; // enough to keep a link busy while the next is posted

class CreditMessage final : public OutboundMessage {
 public:
  explicit CreditMessage(int peer) : OutboundMessage(peer, FrameKind::kCredit, 0) {}
  bool light() const override {
    return true;
  }
  void failed(const std::string&) noexcept override {}

 protected:
  size_t planBody(std::vector<ConstSpan>&) override {
    return 0;
  }
  void writeBody(char*) override {}
};

} // namespace

struct Outgoing::ChunkSend final : Operation {
  ChunkSend(Outgoing& owner, OutboundMessage& sent) : outgoing(owner), message(sent) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    --outgoing.chunksOut_;
    outgoing.operationDone(token, message, 1, status.error);
    outgoing.pump(token);
    delete this;
  }
  Outgoing& outgoing;
  OutboundMessage& message;
};

Outgoing::Outgoing(int rank, Credit& credit, PeerContext& context, PeerFailureListener& owner)
    : rank_(rank),
      credit_(credit),
      context_(context),
      owner_(owner) {}

size_t Outgoing::chunksOf(size_t bytes) const {
  return (bytes + context_.options.bulkChunk - 1) / context_.options.bulkChunk;
}

void Outgoing::post(ProgressToken& token, OutboundPtr message) {
  const uint64_t charged = message->header().chargedBytes;
  Lane& lane = laneOf(charged);
  if (message->needsCredit() && (!lane.waiting.empty() || !credit_.allows(charged))) {
    lane.waiting.push_back(std::move(message));
    lane.count.fetch_add(1, std::memory_order_relaxed);
    context_.counters.waitingForCredit.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  transmit(token, std::move(message));
}

bool Outgoing::wouldSendAtOnce(uint64_t chargedBytes) const {
  const Lane& lane = chargedBytes == 0 ? small_ : large_;
  return lane.count.load(std::memory_order_relaxed) == 0 && credit_.allows(chargedBytes);
}

void Outgoing::reportCredit(ProgressToken& token) {
  transmit(token, std::make_unique<CreditMessage>(rank_));
}

void Outgoing::sendWaiting(ProgressToken& token) {
  for (Lane* lane : {&large_, &small_}) { // the large first, which small ones would keep waiting
    while (!lane->waiting.empty() && credit_.allows(lane->waiting.front()->header().chargedBytes)) {
      OutboundPtr message = std::move(lane->waiting.front());
      lane->waiting.pop_front();
      lane->count.fetch_sub(1, std::memory_order_relaxed);
      context_.counters.waitingForCredit.fetch_sub(1, std::memory_order_relaxed);
      transmit(token, std::move(message));
    }
  }
}

void Outgoing::transmit(ProgressToken& token, OutboundPtr owned) {
  if (!owned->encoded()) {
    try {
      owned->encode(context_.frames);
    } catch (const std::exception& error) {
      context_.done.failed.emplace_back(std::move(owned), errorText(error));
      return;
    }
  }
  OutboundMessage& message = *owned.release(); // its operations own it until operationDone()
  FrameHeader& header = message.header_;
  if (message.needsCredit()) {
    credit_.sent(header.chargedBytes);
  }
  credit_.report(header);
  std::memcpy(message.frame_.data(), &header, sizeof(header));
  const size_t bytes = sizeof(header) + (header.bodyInBulk != 0 ? 0 : header.bodyBytes);

  size_t chunks = 0;
  uint64_t bulkBytes = 0;
  for (const ConstSpan& part : message.parts_) {
    chunks += chunksOf(part.bytes);
    bulkBytes += part.bytes;
  }
  message.outgoing_ = this;
  message.unfinished_ = 1 + chunks;
  ExchangeCounters& counters = context_.counters;
  if (header.kind != FrameKind::kDrain) {
    counters.framesSent.fetch_add(1, std::memory_order_relaxed);
  }
  counters.bytesSent.fetch_add(bytes + bulkBytes, std::memory_order_relaxed);
  counters.unfinishedSends.fetch_add(1, std::memory_order_relaxed);
  ++unfinished_;
  if (chunks > 0) {
    counters.partsOut.fetch_add(1, std::memory_order_relaxed);
    ++partsOut_;
    streams_.push_back({&message, 0, 0});
  }
  FlightRecorder::instance().record(CallEvent::kSent, rank_, header.callId, header.messageType, bytes + bulkBytes);
  context_.transport.send(token, rank_, Channel::kFrame, message.frame_.data(), bytes, &message);
  // Without chunks the message may be gone by now, and after an error what has streams is abandoned.
  pump(token);
}

void Outgoing::pump(ProgressToken& token) {
  if (std::exchange(pumping_, true)) {
    return;
  }
  try {
    while (chunksOut_ < kChunksOut && !streams_.empty()) {
      sendChunk(token);
    }
  } catch (const std::exception& error) { // no memory for an operation
    owner_.onPeerFailed(token, rank_, errorText(error));
  }
  pumping_ = false;
}

void Outgoing::sendChunk(ProgressToken& token) {
  Stream& stream = streams_.front();
  OutboundMessage& message = *stream.message;
  auto operation = std::make_unique<ChunkSend>(*this, message); // first: with what throws nothing has changed
  const ConstSpan part = message.parts_[stream.part];
  const char* data = part.data + stream.offset;
  const size_t bytes = std::min(context_.options.bulkChunk, part.bytes - stream.offset);
  stream.offset += bytes;
  if (stream.offset == part.bytes) {
    stream.offset = 0;
    if (++stream.part == message.parts_.size()) {
      streams_.pop_front();
    }
  }
  ++chunksOut_;
  context_.transport.send(token, rank_, Channel::kBulk, data, bytes, operation.release());
}

void Outgoing::operationDone(
    ProgressToken& token,
    OutboundMessage& message,
    size_t operations,
    const std::string& error) {
  if (!error.empty()) {
    owner_.onPeerFailed(token, rank_, error); // and so abandon(), to which this operation still counts
  }
  message.unfinished_ -= operations;
  if (message.unfinished_ > 0) {
    return;
  }
  if (!abandoned_) {
    context_.counters.unfinishedSends.fetch_sub(1, std::memory_order_relaxed);
    --unfinished_;
    if (!message.parts_.empty()) {
      context_.counters.partsOut.fetch_sub(1, std::memory_order_relaxed);
      --partsOut_;
    }
  }
  OutboundPtr owned(&message);
  if (!owned->light()) {
    try {
      context_.done.sent.push_back(std::move(owned));
    } catch (const std::bad_alloc&) {
      (void)owned.release(); // rather lost than destroyed here, where that may need the GIL
    }
  }
}

void Outgoing::abandon(ProgressToken& token, const std::string& reason) {
  if (std::exchange(abandoned_, true)) {
    return;
  }
  ExchangeCounters& counters = context_.counters;
  for (Lane* lane : {&large_, &small_}) {
    counters.waitingForCredit.fetch_sub(lane->waiting.size(), std::memory_order_relaxed);
    for (OutboundPtr& message : lane->waiting) {
      context_.done.failed.emplace_back(std::move(message), reason);
    }
    lane->waiting.clear();
    lane->count = 0;
  }
  // Nobody waits for these any more, whether they complete or not.
  counters.unfinishedSends.fetch_sub(std::exchange(unfinished_, 0), std::memory_order_relaxed);
  counters.partsOut.fetch_sub(std::exchange(partsOut_, 0), std::memory_order_relaxed);
  cutStreams(token);
}

// The chunks that were not posted never will be.
void Outgoing::cutStreams(ProgressToken& token) {
  for (const Stream& stream : std::exchange(streams_, {})) {
    const auto& parts = stream.message->parts_;
    size_t left = 0;
    for (size_t part = stream.part; part < parts.size(); ++part) {
      left += chunksOf(parts[part].bytes - (part == stream.part ? stream.offset : 0));
    }
    operationDone(token, *stream.message, left, {});
  }
}

} // namespace torch_rpc_mpi
