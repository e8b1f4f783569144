#include "peer/bulk_receiver.h"

#include <algorithm>
#include <deque>
#include <stdexcept>
#include <utility>

#include "base/error_text.h"
#include "peer/exchange.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kChunksIn = 2; // per peer; see Note [Frames and bulk]

} // namespace

// A message whose body or parts come on the bulk channel. States: the body is received first if it is not in the
// frame, because only it tells the parts; then the parts; then the listener gets the message.
struct BulkReceiver::Inbound {
  enum class State { kBody, kParts };
  InboundMessage message;
  State state = State::kBody;
  std::vector<MutableSpan> spans; // of the state
  size_t span = 0;                // next to post
  size_t offset = 0;
  size_t chunks = 0; // posted and not complete
  bool discard = false;

  bool allPosted() const {
    return span == spans.size();
  }
};

struct BulkReceiver::ChunkReceive final : Operation {
  ChunkReceive(BulkReceiver& owner, Inbound* target) : receiver(owner), inbound(target) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    receiver.chunkReceived(token, inbound, status);
    delete this;
  }
  BulkReceiver& receiver;
  Inbound* inbound;
};

struct BulkReceiver::Stream {
  std::deque<std::unique_ptr<Inbound>> inbound; // not all of which is posted, in the order of the frames
  size_t chunks = 0;                            // posted and not complete
};

BulkReceiver::BulkReceiver(Transport& transport, ExchangeListener& listener, size_t chunkBytes)
    : transport_(transport),
      listener_(listener),
      chunkBytes_(chunkBytes),
      streams_(transport.size()) {}

BulkReceiver::~BulkReceiver() = default;

std::string BulkReceiver::receive(ProgressToken& token, InboundMessage message) {
  auto inbound = std::make_unique<Inbound>();
  inbound->message = std::move(message);
  const FrameHeader& header = inbound->message.header;
  const int source = inbound->message.source;
  inFlight_.fetch_add(1, std::memory_order_relaxed);
  if (header.bodyInBulk != 0) {
    inbound->spans.push_back({nullptr, header.bodyBytes});
    try {
      inbound->message.separateBody.reset(new char[header.bodyBytes]);
      inbound->spans[0].data = inbound->message.separateBody.get();
    } catch (const std::bad_alloc&) {
      const std::string error = "there is no memory for a message of " + std::to_string(header.bodyBytes) + " bytes";
      if (header.bulkParts != 0) { // only the body would tell how long the parts are that follow
        inFlight_.fetch_sub(1, std::memory_order_relaxed);
        return error;
      }
      inbound->message.error = error;
      inbound->discard = true;
    }
  } else {
    openParts(*inbound);
  }
  streams_[source].inbound.push_back(std::move(inbound));
  pump(token, source);
  return {};
}

void BulkReceiver::openParts(Inbound& inbound) {
  InboundMessage& message = inbound.message;
  const ConstSpan body = message.body();
  std::vector<MutableSpan> sizes(message.header.bulkParts);
  for (size_t i = 0; i < sizes.size(); ++i) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, body.data + i * sizeof(bytes), sizeof(bytes));
    sizes[i].bytes = bytes;
  }
  inbound.state = Inbound::State::kParts;
  inbound.span = 0;
  inbound.offset = 0;
  try {
    const size_t skip = sizes.size() * sizeof(uint64_t);
    message.target = listener_.makeTarget(message.source, message.header, {body.data + skip, body.bytes - skip});
    const auto same = [](const MutableSpan& a, const MutableSpan& b) { return a.bytes == b.bytes; };
    if (!std::equal(sizes.begin(), sizes.end(), message.target->parts.begin(), message.target->parts.end(), same)) {
      throw std::runtime_error("the sizes of its parts contradict each other");
    }
    inbound.spans = message.target->parts;
  } catch (const std::exception& error) {
    // The chunks come all the same; the stream goes on behind them.
    message.error = errorText(error);
    inbound.discard = true;
    inbound.spans = std::move(sizes);
  }
}

void BulkReceiver::pump(ProgressToken& token, int source) {
  Stream& stream = streams_[source];
  while (stream.chunks < kChunksIn && !stream.inbound.empty()) {
    Inbound* inbound = stream.inbound.front().get();
    if (inbound->allPosted()) {
      return; // a body under way: its parts are not known yet
    }
    const MutableSpan span = inbound->spans[inbound->span];
    const size_t bytes = std::min(chunkBytes_, span.bytes - inbound->offset);
    char* data = inbound->discard ? nullptr : span.data + inbound->offset;
    inbound->offset += bytes;
    if (inbound->offset == span.bytes) {
      inbound->offset = 0;
      ++inbound->span;
    }
    ++inbound->chunks;
    ++stream.chunks;
    if (inbound->allPosted() && inbound->state == Inbound::State::kParts) {
      (void)stream.inbound.front().release(); // owned by its operations from here on
      stream.inbound.pop_front();
    }
    // Receiving into nothing makes MPI drop the chunk as truncated.
    transport_.receiveBulk(token, source, data, inbound->discard ? 0 : bytes, new ChunkReceive(*this, inbound));
  }
}

void BulkReceiver::chunkReceived(ProgressToken& token, Inbound* inbound, const OperationStatus& status) {
  const int source = inbound->message.source;
  Stream& stream = streams_[source];
  --stream.chunks;
  --inbound->chunks;
  bytesReceived_.fetch_add(status.bytes, std::memory_order_relaxed);
  if (!status.ok() && !inbound->discard && inbound->message.error.empty()) {
    inbound->message.error = status.error;
  }
  if (inbound->chunks == 0 && inbound->allPosted()) {
    if (inbound->state == Inbound::State::kBody && !inbound->discard) {
      openParts(*inbound);
    }
    if (inbound->allPosted()) {
      inFlight_.fetch_sub(1, std::memory_order_relaxed);
      std::unique_ptr<Inbound> owned;
      if (!stream.inbound.empty() && stream.inbound.front().get() == inbound) {
        owned = std::move(stream.inbound.front()); // a body without parts
        stream.inbound.pop_front();
      } else {
        owned.reset(inbound);
      }
      listener_.onMessage(token, std::move(owned->message));
    }
  }
  pump(token, source);
}

void BulkReceiver::close() noexcept {
  for (Stream& stream : streams_) {
    for (std::unique_ptr<Inbound>& inbound : stream.inbound) {
      if (inbound->chunks > 0) {
        (void)inbound.release();
      }
    }
    stream.inbound.clear();
  }
}

} // namespace torch_rpc_mpi
