#include "peer/sending.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "base/error_text.h"
#include "base/flight_recorder.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kChunksOut = 4; // enough to keep a link busy while the next is posted

} // namespace

struct Sending::ChunkSend final : Operation {
  ChunkSend(Sending& owner, OutboundMessage& sent, ChunkSource* from) : sending(owner), message(sent), source(from) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    std::erase(sending.chunks_, this);
    if (source != nullptr) {
      source->sent();
    }
    sending.operationDone(token, message, 1, status.error);
    sending.pump(token);
    delete this;
  }
  Sending& sending;
  OutboundMessage& message;
  ConstSpan chunk;
  ChunkSource* const source; // null: memory
};

Sending::Sending(int rank, Credit& credit, PeerContext& context, Gate& gate, PeerFailureListener& owner)
    : rank_(rank),
      credit_(credit),
      context_(context),
      gate_(gate),
      owner_(owner) {
  chunks_.reserve(kChunksOut);
}

// From an offset on.
size_t Sending::chunksOf(OutboundMessage& message, size_t part, size_t offset) const {
  if (const ChunkSource* source = message.sourceOfAny(part)) {
    return source->chunks() - offset;
  }
  return (message.parts_[part].bytes - offset + context_.options.bulkChunk - 1) / context_.options.bulkChunk;
}

void Sending::count(const FrameHeader& header) {
  if (header.kind != FrameKind::kDrain && header.kind != FrameKind::kBatch) { // of which each frame counts
    context_.counters.framesSent.fetch_add(1, std::memory_order_relaxed);
  }
  if (header.kind == FrameKind::kRequest || header.kind == FrameKind::kResponse) {
    FlightRecorder::instance().record(CallEvent::kSent, rank_, header.callId, header.messageType, header.bodyBytes);
  }
}

void Sending::transmit(ProgressToken& token, OutboundPtr owned) {
  OutboundMessage& message = *owned.release(); // its operations own it until operationDone()
  FrameHeader& header = message.header_;
  credit_.report(header);
  std::memcpy(message.frame_.data(), &header, sizeof(header));
  const size_t bytes = message.frameBytes();

  size_t chunks = 0;
  uint64_t bulkBytes = 0;
  for (size_t part = 0; part < message.parts_.size(); ++part) {
    chunks += chunksOf(message, part);
    bulkBytes += message.parts_[part].bytes;
  }
  message.sending_ = this;
  message.leaves();
  message.unfinished_ = 1 + chunks;
  ExchangeCounters& counters = context_.counters;
  if (chunks > 0) {
    withParts_.push_back(&message);
  }
  count(header);
  counters.bytesSent.fetch_add(bytes + bulkBytes, std::memory_order_relaxed);
  counters.unfinishedSends.fetch_add(1, std::memory_order_relaxed);
  ++unfinished_;
  if (chunks > 0) {
    counters.partsOut.fetch_add(1, std::memory_order_relaxed);
    streams_.push_back({&message, 0, 0});
  }
  gate_.posted(Channel::kFrame);
  context_.transport.send(token, rank_, Channel::kFrame, message.frame_.data(), bytes, &message);
  // Without chunks the message may be gone by now, and after an error what has streams is abandoned.
  pump(token);
}

void Sending::sentInBatch(OutboundPtr message) {
  count(message->header_);
  letGo(std::move(message));
}

bool Sending::pump(ProgressToken& token) {
  if (std::exchange(pumping_, true)) {
    return false;
  }
  bool any = false;
  try {
    while (chunks_.size() < kChunksOut && !streams_.empty() && gate_.allows(token, Channel::kBulk)) {
      if (!sendChunk(token)) {
        gate_.awaitDevice();
        break;
      }
      any = true;
    }
  } catch (const std::exception& error) { // no memory for an operation, or a device failed
    owner_.onPeerFailed(token, rank_, errorText(error));
  }
  pumping_ = false;
  return any;
}

bool Sending::sendChunk(ProgressToken& token) {
  Stream& stream = streams_.front();
  OutboundMessage& message = *stream.message;
  ChunkSource* const source = message.sourceOfAny(stream.part);
  auto operation = std::make_unique<ChunkSend>(*this, message, source); // first: with what throws nothing has changed
  const ConstSpan part = message.parts_[stream.part];
  ConstSpan& chunk = operation->chunk;
  if (source == nullptr) {
    chunk = {part.data + stream.offset, std::min(context_.options.bulkChunk, part.bytes - stream.offset)};
    stream.offset += chunk.bytes;
  } else if (const auto next = source->next()) {
    chunk = *next;
    ++stream.offset;
  } else {
    return false;
  }
  if (stream.offset == (source == nullptr ? part.bytes : source->chunks())) {
    stream.offset = 0;
    if (++stream.part == message.parts_.size()) {
      streams_.pop_front();
    }
  }
  chunks_.push_back(operation.get());
  gate_.posted(Channel::kBulk);
  context_.transport.send(token, rank_, Channel::kBulk, chunk.data, chunk.bytes, operation.release());
  return true;
}

void Sending::operationDone(
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
  if (!message.parts_.empty()) {
    std::erase(abandoned_ ? context_.kept : withParts_, &message);
  }
  if (!abandoned_) {
    context_.counters.unfinishedSends.fetch_sub(1, std::memory_order_relaxed);
    --unfinished_;
    if (!message.parts_.empty()) {
      context_.counters.partsOut.fetch_sub(1, std::memory_order_relaxed);
    }
  }
  letGo(OutboundPtr(&message));
}

void Sending::letGo(OutboundPtr message) {
  if (!message->light()) {
    try {
      context_.done.sent.push_back(std::move(message));
    } catch (const std::bad_alloc&) {
      (void)message.release(); // rather lost than destroyed here, where that may need the GIL
    }
  }
}

void Sending::abandon(ProgressToken& token) {
  if (std::exchange(abandoned_, true)) {
    return;
  }
  ExchangeCounters& counters = context_.counters;
  // Nobody waits for these any more, whether they complete or not.
  counters.unfinishedSends.fetch_sub(std::exchange(unfinished_, 0), std::memory_order_relaxed);
  counters.partsOut.fetch_sub(withParts_.size(), std::memory_order_relaxed);
  keep();
  cutStreams(token);
}

// What MPI may still read, unless it completes after all.
void Sending::keep() {
  std::ranges::sort(chunks_, {}, [](const ChunkSend* send) { return send->chunk.data; });
  for (OutboundMessage* message : std::exchange(withParts_, {})) {
    try {
      for (const ChunkSend* send : chunks_) {
        if (&send->message == message) {
          message->posted_.push_back(send->chunk);
        }
      }
      if (OutboundPtr source = message->releaseSource()) {
        letGo(std::move(source));
      }
      context_.kept.push_back(message);
    } catch (const std::bad_alloc&) { // then it keeps its memory
    }
  }
}

// The chunks that were not posted never will be.
void Sending::cutStreams(ProgressToken& token) {
  for (const Stream& stream : std::exchange(streams_, {})) {
    const auto& parts = stream.message->parts_;
    size_t left = 0;
    for (size_t part = stream.part; part < parts.size(); ++part) {
      left += chunksOf(*stream.message, part, part == stream.part ? stream.offset : 0);
    }
    operationDone(token, *stream.message, left, {});
  }
}

} // namespace torch_rpc_mpi
