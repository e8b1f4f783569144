#include "peer/incoming.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <utility>

#include "base/error_text.h"
#include "host/no_memory.h"
#include "host/pages.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kChunksIn = 2; // see Note [Frames and bulk]

} // namespace

// A message whose body or parts come on the bulk channel. States: the body is received first if it is not in the
// frame, because only it tells the parts; then the parts; then the listener gets the message.
struct Incoming::Message {
  enum class State { kBody, kParts };
  InboundMessage inbound;
  State state = State::kBody;
  std::vector<MutableSpan> spans; // of the state
  size_t span = 0;                // next to post
  size_t offset = 0;
  size_t chunks = 0;    // posted and not complete
  bool discard = false; // there is no memory for it, but its chunks come all the same

  ChunkSink* sink() const { // of the span
    const auto* target = inbound.target.get();
    return state == State::kParts && target != nullptr && !target->sinks.empty() ? target->sinks[span].get() : nullptr;
  }

  bool allPosted() const {
    return span == spans.size();
  }
  // Its memory is needed no more, although the transport may write to it: that of devices goes, and the host's pages.
  void abandon() noexcept {
    BulkTarget* const target = state == State::kParts ? inbound.target.get() : nullptr;
    for (size_t i = 0; i < spans.size() && !discard; ++i) {
      if (spans[i].data != nullptr && (target == nullptr || target->sinks.empty() || target->sinks[i] == nullptr)) {
        giveBackPages(spans[i].data, spans[i].bytes);
      }
    }
    if (target != nullptr) {
      target->abandon();
    }
  }
};

struct Incoming::ChunkReceive final : Operation {
  ChunkReceive(Incoming& receiver, Message* into, ChunkSink* to) : incoming(receiver), message(into), sink(to) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    try {
      if (sink != nullptr && status.ok() && status.bytes == expected && !incoming.abandoned_) {
        sink->received();
      }
      incoming.chunkReceived(token, message, discard ? std::nullopt : std::optional(expected), status);
    } catch (const std::exception& error) { // no memory; what follows on this channel cannot be told apart any more
      incoming.owner_.onPeerFailed(token, incoming.rank_, errorText(error));
    }
    delete this;
  }
  Incoming& incoming;
  Message* const message;
  ChunkSink* const sink; // null: memory
  size_t expected = 0;   // bytes
  bool discard = false;
};

Incoming::Incoming(int rank, PeerContext& context, PeerFailureListener& owner)
    : rank_(rank),
      context_(context),
      owner_(owner) {
  receiving_.reserve(kChunksIn);
}

Incoming::~Incoming() = default;

void Incoming::receive(ProgressToken& token, InboundMessage&& inbound) {
  auto message = std::make_unique<Message>();
  message->inbound = std::move(inbound);
  const FrameHeader& header = message->inbound.header;
  if (header.bodyInBulk != 0) {
    message->spans.push_back({nullptr, header.bodyBytes});
    try {
      message->inbound.separateBody.reset(new char[header.bodyBytes]);
      message->spans[0].data = message->inbound.separateBody.get();
    } catch (const std::bad_alloc&) {
      const NoMemory error("a message", header.bodyBytes);
      if (header.bulkParts != 0) { // only the body would tell how long the parts are that follow
        throw error;
      }
      message->inbound.error = error.what();
      message->discard = true;
    }
  } else {
    openParts(*message);
  }
  messages_.push_back(std::move(message));
  ++unfinished_;
  context_.counters.partsIn.fetch_add(1, std::memory_order_relaxed);
  pump(token);
}

bool Incoming::lacksPartOf(FrameKind kind, uint64_t callId) const {
  return std::ranges::any_of(messages_, [&](const std::unique_ptr<Message>& message) {
    return message->inbound.header.kind == kind && message->inbound.header.callId == callId;
  });
}

void Incoming::openParts(Message& message) {
  InboundMessage& inbound = message.inbound;
  const ConstSpan body = inbound.body();
  std::vector<MutableSpan> sizes(inbound.header.bulkParts);
  for (size_t i = 0; i < sizes.size(); ++i) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, body.data + i * sizeof(bytes), sizeof(bytes));
    sizes[i].bytes = bytes;
  }
  message.state = Message::State::kParts;
  message.span = 0;
  message.offset = 0;
  const size_t skip = sizes.size() * sizeof(uint64_t);
  try {
    inbound.target = context_.listener.makeTarget(rank_, inbound.header, {body.data + skip, body.bytes - skip});
  } catch (const std::bad_alloc& error) {
    // The chunks come all the same; the stream goes on behind them.
    inbound.error = errorText(error);
    message.discard = true;
    message.spans = std::move(sizes);
    return;
  } catch (const std::exception& error) { // so that nothing in it can be relied on, the sizes neither
    throw std::runtime_error("it sent a message that makes no sense: " + errorText(error));
  }
  const auto same = [](const MutableSpan& a, const MutableSpan& b) { return a.bytes == b.bytes; };
  if (!std::ranges::equal(sizes, inbound.target->parts, same)) {
    throw std::runtime_error("it sent a message that makes no sense: the sizes of its parts contradict each other");
  }
  message.spans = inbound.target->parts;
}

bool Incoming::tryDevice(ProgressToken& token) {
  atDevice_ = false;
  try {
    return pump(token);
  } catch (const std::exception& error) { // no pinned memory, or a device failed
    owner_.onPeerFailed(token, rank_, errorText(error));
    return true;
  }
}

bool Incoming::pump(ProgressToken& token) {
  bool any = false;
  while (chunksIn_ < kChunksIn && !messages_.empty() && !abandoned_) {
    Message* message = messages_.front().get();
    if (message->allPosted()) {
      break; // a body under way: its parts are not known yet
    }
    const MutableSpan span = message->spans[message->span];
    ChunkSink* const sink = message->sink();
    auto operation = std::make_unique<ChunkReceive>(*this, message, sink);
    MutableSpan chunk;
    if (sink == nullptr) {
      chunk.bytes = std::min(context_.options.bulkChunk, span.bytes - message->offset);
      chunk.data = span.data == nullptr ? nullptr : span.data + message->offset;
      message->offset += chunk.bytes;
    } else if (const auto next = sink->next()) {
      chunk = *next;
      ++message->offset;
    } else {
      if (!std::exchange(atDevice_, true)) {
        context_.atDevice.push_back(rank_);
      }
      break;
    }
    any = true;
    operation->expected = chunk.bytes;
    operation->discard = chunk.data == nullptr;
    if (message->offset == (sink == nullptr ? span.bytes : sink->chunks())) {
      message->offset = 0;
      ++message->span;
    }
    if (message->chunks == 0) {
      receiving_.push_back(message);
    }
    ++message->chunks;
    ++chunksIn_;
    if (message->allPosted() && message->state == Message::State::kParts) {
      (void)messages_.front().release(); // owned by its operations from here on
      messages_.pop_front();
    }
    // Receiving into nothing makes MPI drop the chunk as truncated.
    const size_t room = operation->discard ? 0 : chunk.bytes;
    context_.transport.receiveBulk(token, rank_, chunk.data, room, operation.release());
  }
  return any;
}

// expected: nothing for one that is dropped.
void Incoming::chunkReceived(
    ProgressToken& token,
    Message* message,
    std::optional<size_t> expected,
    const OperationStatus& status) {
  --chunksIn_;
  if (--message->chunks == 0) {
    std::erase(receiving_, message);
  }
  if (abandoned_) {
    if (message->chunks == 0) {
      delete message;
    }
    return;
  }
  context_.counters.bytesReceived.fetch_add(status.bytes, std::memory_order_relaxed);
  if (expected && (!status.ok() || status.bytes != *expected)) {
    // What comes next on this channel belongs to no known place.
    const std::string what = !status.ok() ? status.error
                                          : "a chunk of " + std::to_string(status.bytes) + " bytes came where " +
            std::to_string(*expected) + " were announced";
    if (message->chunks == 0 && message->allPosted() && message->state == Message::State::kParts) {
      delete message; // this was its last operation
      --unfinished_;
      context_.counters.partsIn.fetch_sub(1, std::memory_order_relaxed);
    }
    owner_.onPeerFailed(token, rank_, what);
    return;
  }
  if (message->chunks == 0 && message->allPosted()) {
    if (message->state == Message::State::kBody && !message->discard) {
      openParts(*message);
    }
    if (message->allPosted()) {
      complete(token, message);
    }
  }
  if (!abandoned_) {
    pump(token);
  }
}

void Incoming::complete(ProgressToken& token, Message* message) {
  std::unique_ptr<Message> owned;
  if (!messages_.empty() && messages_.front().get() == message) {
    owned = std::move(messages_.front()); // a body without parts
    messages_.pop_front();
  } else {
    owned.reset(message);
  }
  --unfinished_;
  context_.counters.partsIn.fetch_sub(1, std::memory_order_relaxed);
  InboundMessage& inbound = owned->inbound;
  if (inbound.target != nullptr && !inbound.target->error.empty()) {
    inbound.error = std::move(inbound.target->error);
  }
  context_.listener.onMessage(token, std::move(inbound));
}

void Incoming::abandon() noexcept {
  abandoned_ = true;
  for (std::unique_ptr<Message>& message : messages_) {
    if (message->chunks > 0) {
      (void)message.release(); // until its operations are complete
    }
  }
  messages_.clear();
  for (Message* message : receiving_) {
    message->abandon();
  }
  context_.counters.partsIn.fetch_sub(std::exchange(unfinished_, 0), std::memory_order_relaxed);
}

} // namespace torch_rpc_mpi
