#include "peer/outgoing.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include "base/error_text.h"
#include "base/flight_recorder.h"
#include "peer/outbound_control.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kAskedInTurn = 16; // messages, whether they are ready
constexpr size_t kChunksOut = 4;    // enough to keep a link busy while the next is posted
// Of a batch: it fits a cell of shared memory, of which MPICH's have 16 KiB, and is copied in a microsecond.
constexpr size_t kBatchBytes = 8192;

// Or cannot be sent: stage() tells.
bool isReady(OutboundMessage& message) {
  try {
    return message.ready();
  } catch (const std::exception&) {
    return false;
  }
}

} // namespace

struct Outgoing::ChunkSend final : Operation {
  ChunkSend(Outgoing& owner, OutboundMessage& sent, ChunkSource* from) : outgoing(owner), message(sent), source(from) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    std::erase(outgoing.chunks_, this);
    if (source != nullptr) {
      source->sent();
    }
    outgoing.operationDone(token, message, 1, status.error);
    outgoing.pump(token);
    delete this;
  }
  Outgoing& outgoing;
  OutboundMessage& message;
  ConstSpan chunk;
  ChunkSource* const source; // null: memory
};

Outgoing::Outgoing(int rank, Credit& credit, PeerContext& context, PeerFailureListener& owner)
    : rank_(rank),
      credit_(credit),
      context_(context),
      owner_(owner),
      window_(rank, context.transport, context.windows),
      waiting_(credit, context.counters) {
  chunks_.reserve(kChunksOut);
}

// From an offset on.
size_t Outgoing::chunksOf(OutboundMessage& message, size_t part, size_t offset) const {
  if (const ChunkSource* source = message.sourceOfAny(part)) {
    return source->chunks() - offset;
  }
  return (message.parts_[part].bytes - offset + context_.options.bulkChunk - 1) / context_.options.bulkChunk;
}

void Outgoing::post(ProgressToken& token, OutboundPtr message) {
  const bool waits = framesBlocked_ || waiting_.wouldWait(message->needsCredit(), message->header().chargedBytes);
  if (waits || !windowAllows(token, Channel::kFrame)) {
    waiting_.add(std::move(message));
  } else {
    send(token, std::move(message));
  }
}

void Outgoing::send(ProgressToken& token, OutboundPtr message) {
  const std::string error = encode(*message);
  if (!error.empty()) {
    context_.done.failed.emplace_back(std::move(message), error);
    return;
  }
  charge(*message);
  if (!stage(message)) {
    transmit(token, gather(std::move(message)));
  }
}

bool Outgoing::stage(OutboundPtr& message) {
  try {
    if (message->ready()) {
      return false;
    }
    hold(message);
  } catch (const std::exception& thrown) {
    failCharged(std::move(message), errorText(thrown));
  }
  return true;
}

void Outgoing::hold(OutboundPtr& message) {
  staged_.push_back(std::move(message)); // which leaves it where it is if there is no memory
  context_.counters.waitingForDevice.fetch_add(1, std::memory_order_relaxed);
  awaitDevice();
}

void Outgoing::failCharged(OutboundPtr message, const std::string& error) {
  giveBackCredit(*message);
  context_.done.failed.emplace_back(std::move(message), error);
}

// The exchange calls tryDevice() in each turn.
void Outgoing::awaitDevice() {
  if (!std::exchange(atDevice_, true)) {
    context_.atDevice.push_back(rank_);
  }
}

// Messages overtake each other here, as they may at the callee.
bool Outgoing::tryDevice(ProgressToken& token) {
  atDevice_ = false;
  bool any = false;
  // A peer that fails meanwhile takes all of them along.
  for (size_t left = std::min(staged_.size(), kAskedInTurn);
       left > 0 && !staged_.empty() && windowAllows(token, Channel::kFrame); --left) {
    OutboundPtr message = std::move(staged_.front());
    staged_.pop_front();
    context_.counters.waitingForDevice.fetch_sub(1, std::memory_order_relaxed);
    if (!stage(message)) {
      transmit(token, std::move(message));
      any = true;
    }
  }
  if (!staged_.empty() && !framesBlocked_) { // else tryAgain() does
    awaitDevice();
  }
  const bool waited = sendWaiting(token); // for the credit of one that failed
  return pump(token) || any || waited;
}

std::deque<OutboundPtr>::const_iterator Outgoing::findStaged(uint64_t callId) const {
  return std::ranges::find_if(staged_, [&](const OutboundPtr& message) {
    return message->header_.kind == FrameKind::kRequest && message->header_.callId == callId;
  });
}

OutboundPtr Outgoing::takeStaged(uint64_t callId) {
  const auto found = staged_.begin() + (findStaged(callId) - staged_.begin());
  if (found == staged_.end()) {
    return nullptr;
  }
  OutboundPtr message = std::move(*found);
  staged_.erase(found);
  context_.counters.waitingForDevice.fetch_sub(1, std::memory_order_relaxed);
  giveBackCredit(*message);
  return message;
}

OutboundPtr Outgoing::forget(ProgressToken& token, uint64_t callId) {
  OutboundPtr message = waiting_.takeRequest(callId);
  if (message == nullptr && (message = takeStaged(callId)) != nullptr) {
    sendWaiting(token);
  }
  if (message == nullptr) {
    post(token, std::make_unique<OutboundControl>(rank_, FrameKind::kForget, std::string(), callId));
  }
  return message;
}

// If not, the exchange calls tryAgain().
bool Outgoing::windowAllows(ProgressToken& token, Channel channel) {
  if (window_.allows(token, channel)) {
    return true;
  }
  framesBlocked_ = framesBlocked_ || channel == Channel::kFrame;
  if (!std::exchange(blocked_, true)) {
    context_.blocked.push_back(rank_);
  }
  window_.await(token);
  return false;
}

bool Outgoing::wouldSendAtOnce(uint64_t chargedBytes) const {
  return !waiting_.wouldWait(/*request=*/true, chargedBytes);
}

void Outgoing::reportCredit(ProgressToken& token) {
  if (!framesBlocked_ && windowAllows(token, Channel::kFrame)) {
    send(token, std::make_unique<OutboundControl>(rank_, FrameKind::kCredit));
  }
}

bool Outgoing::sendWaiting(ProgressToken& token) {
  bool any = false;
  while (!framesBlocked_ && waiting_.next() != nullptr && windowAllows(token, Channel::kFrame)) {
    send(token, waiting_.takeNext());
    any = true;
  }
  return any;
}

bool Outgoing::tryAgain(ProgressToken& token) {
  blocked_ = false;
  framesBlocked_ = false;
  const bool frames = sendWaiting(token);
  if (!staged_.empty()) {
    awaitDevice();
  }
  return pump(token) || frames;
}

void Outgoing::sendGoodbye(ProgressToken& token) {
  OutboundPtr goodbye = waiting_.takeGoodbye();
  if (goodbye != nullptr && encode(*goodbye).empty()) {
    transmit(token, std::move(goodbye));
  }
}

// What waits behind a message and fits a frame with it, all as one; or the message alone.
OutboundPtr Outgoing::gather(OutboundPtr first) {
  if (waiting_.next() == nullptr || !first->parts_.empty()) {
    return first;
  }
  OutboundPtr batch;
  try {
    batch = std::make_unique<OutboundControl>(rank_, FrameKind::kBatch);
    batch->frame_ = context_.frames.get();
  } catch (const std::bad_alloc&) { // then they go one by one
    return first;
  }
  const size_t limit = std::min(kBatchBytes, context_.frames.bodyCapacity());
  while (OutboundMessage* next = waiting_.next()) {
    if (const std::string error = encode(*next); !error.empty()) {
      context_.done.failed.emplace_back(waiting_.takeNext(), error);
      continue;
    }
    if (!isReady(*next)) {
      OutboundPtr unready = waiting_.takeNext();
      charge(*unready);
      try {
        hold(unready); // asked again, it might be ready, or say why it never will be
      } catch (const std::bad_alloc& failure) {
        failCharged(std::move(unready), errorText(failure));
      }
      continue;
    }
    const size_t before = first != nullptr ? first->frameBytes() : batch->header_.bodyBytes;
    if (!next->parts_.empty() || before + next->frameBytes() > limit) {
      break;
    }
    if (first != nullptr) {
      addTo(*batch, std::move(first));
    }
    OutboundPtr taken = waiting_.takeNext();
    charge(*taken);
    addTo(*batch, std::move(taken));
  }
  return first != nullptr ? std::move(first) : std::move(batch);
}

void Outgoing::addTo(OutboundMessage& batch, OutboundPtr message) {
  const size_t bytes = message->frameBytes();
  message->leaves();
  char* const place = batch.frame_.body() + batch.header_.bodyBytes;
  std::memcpy(place, message->frame_.data(), bytes);
  std::memcpy(place, &message->header_, sizeof(FrameHeader));
  batch.header_.bodyBytes += bytes;
  count(message->header_);
  letGo(std::move(message));
}

std::string Outgoing::encode(OutboundMessage& message) {
  try {
    if (!message.encoded()) {
      message.encode(context_.frames);
    }
    return {};
  } catch (const std::exception& error) {
    return errorText(error);
  }
}

void Outgoing::charge(const OutboundMessage& message) {
  if (message.needsCredit()) {
    credit_.sent(message.header_.chargedBytes);
  }
}

void Outgoing::giveBackCredit(const OutboundMessage& message) {
  if (message.needsCredit()) {
    credit_.notSent(message.header_.chargedBytes);
  }
}

void Outgoing::count(const FrameHeader& header) {
  if (header.kind != FrameKind::kDrain && header.kind != FrameKind::kBatch) { // of which each frame counts
    context_.counters.framesSent.fetch_add(1, std::memory_order_relaxed);
  }
  if (header.kind == FrameKind::kRequest || header.kind == FrameKind::kResponse) {
    FlightRecorder::instance().record(CallEvent::kSent, rank_, header.callId, header.messageType, header.bodyBytes);
  }
}

// Encoded and charged.
void Outgoing::transmit(ProgressToken& token, OutboundPtr owned) {
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
  message.outgoing_ = this;
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
  window_.posted(Channel::kFrame);
  context_.transport.send(token, rank_, Channel::kFrame, message.frame_.data(), bytes, &message);
  // Without chunks the message may be gone by now, and after an error what has streams is abandoned.
  pump(token);
}

bool Outgoing::pump(ProgressToken& token) {
  if (std::exchange(pumping_, true)) {
    return false;
  }
  bool any = false;
  try {
    while (chunks_.size() < kChunksOut && !streams_.empty() && windowAllows(token, Channel::kBulk)) {
      if (!sendChunk(token)) {
        awaitDevice();
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

bool Outgoing::sendChunk(ProgressToken& token) {
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
  window_.posted(Channel::kBulk);
  context_.transport.send(token, rank_, Channel::kBulk, chunk.data, chunk.bytes, operation.release());
  return true;
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

void Outgoing::letGo(OutboundPtr message) {
  if (!message->light()) {
    try {
      context_.done.sent.push_back(std::move(message));
    } catch (const std::bad_alloc&) {
      (void)message.release(); // rather lost than destroyed here, where that may need the GIL
    }
  }
}

void Outgoing::abandon(ProgressToken& token, const std::string& reason) {
  if (std::exchange(abandoned_, true)) {
    return;
  }
  while (OutboundPtr message = waiting_.takeAny()) {
    context_.done.failed.emplace_back(std::move(message), reason);
  }
  ExchangeCounters& counters = context_.counters;
  for (OutboundPtr& message : std::exchange(staged_, {})) {
    counters.waitingForDevice.fetch_sub(1, std::memory_order_relaxed);
    context_.done.failed.emplace_back(std::move(message), reason);
  }
  // Nobody waits for these any more, whether they complete or not.
  counters.unfinishedSends.fetch_sub(std::exchange(unfinished_, 0), std::memory_order_relaxed);
  counters.partsOut.fetch_sub(withParts_.size(), std::memory_order_relaxed);
  keep();
  cutStreams(token);
}

// What MPI may still read, unless it completes after all.
void Outgoing::keep() {
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
void Outgoing::cutStreams(ProgressToken& token) {
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
