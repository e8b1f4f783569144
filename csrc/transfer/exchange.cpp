#include "transfer/exchange.h"

#include <algorithm>
#include <utility>

namespace torch_rpc_mpi {

namespace {

constexpr int kFrameReceives = 32; // posted at once: a burst this long needs no unexpected-message copy inside MPI
constexpr size_t kChunksOut = 4;   // per peer; enough to keep a link busy while the next is posted
constexpr size_t kChunksIn = 2;    // per peer; see Note [Frames and bulk]
constexpr auto kStale = std::chrono::microseconds(300); // longer than most calls take, whose responses report as well
constexpr size_t kDescriptorSpace = 1024; // a frame holds the eager limit and the description of some tensors

// A frame that is nothing but its header.
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

struct Exchange::FrameReceive final : Operation {
  explicit FrameReceive(Exchange& owner) : exchange(owner) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    FrameBuffer arrived = std::move(buffer);
    try {
      exchange.postFrameReceive(token, this);
      exchange.onFrame(token, std::move(arrived), status);
    } catch (const std::exception& error) {
      exchange.fatal_ = error.what();
    }
  }
  Exchange& exchange;
  FrameBuffer buffer;
};

// A message whose body or parts come on the bulk channel. States: the body is received first if it is not in the
// frame, because only it tells the parts; then the parts; then the listener gets the message.
struct Exchange::Inbound {
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

struct Exchange::ChunkReceive final : Operation {
  ChunkReceive(Exchange& owner, Inbound* target) : exchange(owner), inbound(target) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    exchange.chunkReceived(token, inbound, status);
    delete this;
  }
  Exchange& exchange;
  Inbound* inbound;
};

struct Exchange::Peer {
  std::string gone; // why nothing is sent to it any more
  // Requests sent and reported as taken, cumulative; atomics because wouldSendAtOnce() looks at them.
  std::atomic<uint64_t> sentRequests{0}, sentBytes{0}, ackedRequests{0}, ackedBytes{0};
  std::atomic<size_t> waitingCount{0};
  std::deque<OutboundPtr> waiting;
  // What we took of its requests, and what it was told of that.
  std::atomic<uint64_t> releasedRequests{0}, releasedBytes{0}, toldRequests{0}, toldBytes{0};
  std::atomic<bool> due{false};
  uint64_t releasedAtLook = 0; // by reportStaleCredits()

  struct Stream {
    OutboundMessage* message;
    size_t part;
    size_t offset;
  };
  std::deque<Stream> out;
  std::deque<std::unique_ptr<Inbound>> in;
  size_t chunksOut = 0;
  size_t chunksIn = 0;
  bool pumping = false; // an operation that completes inside send() must not recurse
};

struct Exchange::ChunkSend final : Operation {
  ChunkSend(Exchange& owner, OutboundMessage* sent) : exchange(owner), message(sent) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    Peer& peer = *exchange.peers_[message->peer()];
    const int rank = message->peer();
    --peer.chunksOut;
    message->complete(token, status);
    exchange.pumpOut(token, rank);
    delete this;
  }
  Exchange& exchange;
  OutboundMessage* message;
};

Exchange::Exchange(Transport& transport, ExchangeListener& listener, ExchangeOptions options)
    : transport_(transport),
      listener_(listener),
      options_(options),
      frames_(std::make_shared<FramePool>(sizeof(FrameHeader) + options.eagerLimit + kDescriptorSpace)) {
  for (int rank = 0; rank < transport.size(); ++rank) {
    peers_.push_back(std::make_unique<Peer>());
  }
}

Exchange::~Exchange() = default;

void Exchange::start(ProgressToken& token) {
  for (int i = 0; i < kFrameReceives; ++i) {
    receives_.push_back(std::make_unique<FrameReceive>(*this));
    postFrameReceive(token, receives_.back().get());
  }
}

void Exchange::postFrameReceive(ProgressToken& token, FrameReceive* slot) {
  slot->buffer = frames_->get();
  transport_.receiveFrame(token, slot->buffer.data(), slot->buffer.capacity(), slot);
}

// ---- sending ----

void Exchange::post(ProgressToken& token, OutboundPtr message) {
  Peer& peer = *peers_[message->peer()];
  if (closed_ || !peer.gone.empty()) {
    failed_.emplace_back(std::move(message), closed_ ? "RPC was shut down" : peer.gone);
    return;
  }
  if (message->needsCredit() && (!peer.waiting.empty() || !hasCredit(peer, message->header().chargedBytes))) {
    peer.waiting.push_back(std::move(message));
    peer.waitingCount.fetch_add(1, std::memory_order_relaxed);
    counts_.waitingForCredit.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  transmit(token, std::move(message));
}

bool Exchange::hasCredit(const Peer& peer, uint64_t bytes) const {
  const uint64_t requestsOut = peer.sentRequests.load() - peer.ackedRequests.load();
  const uint64_t bytesOut = peer.sentBytes.load() - peer.ackedBytes.load();
  return requestsOut == 0 || (requestsOut < options_.windowRequests && bytesOut + bytes <= options_.windowBytes);
}

bool Exchange::wouldSendAtOnce(int rank, uint64_t chargedBytes) const {
  const Peer& peer = *peers_[rank];
  return peer.waitingCount.load(std::memory_order_relaxed) == 0 && hasCredit(peer, chargedBytes);
}

void Exchange::transmit(ProgressToken& token, OutboundPtr owned) {
  if (!owned->encoded()) {
    try {
      owned->encode(*frames_);
    } catch (const std::exception& error) {
      failed_.emplace_back(std::move(owned), error.what());
      return;
    }
  }
  OutboundMessage* message = owned.release(); // its operations own it until finished()
  Peer& peer = *peers_[message->peer()];
  FrameHeader& header = message->header_;
  if (message->needsCredit()) {
    peer.sentRequests.fetch_add(1);
    peer.sentBytes.fetch_add(header.chargedBytes);
  }
  header.releasedRequests = peer.releasedRequests.load();
  header.releasedBytes = peer.releasedBytes.load();
  peer.toldRequests = header.releasedRequests;
  peer.toldBytes = header.releasedBytes;
  std::memcpy(message->frame_.data(), &header, sizeof(header));
  const size_t bytes = sizeof(header) + (header.bodyInBulk != 0 ? 0 : header.bodyBytes);

  message->exchange_ = this;
  message->unfinished_ = 1;
  uint64_t bulkBytes = 0;
  for (const ConstSpan& part : message->parts_) {
    message->unfinished_ += (part.bytes + options_.bulkChunk - 1) / options_.bulkChunk;
    bulkBytes += part.bytes;
  }
  if (header.kind != FrameKind::kDrain) {
    counts_.framesSent.fetch_add(1, std::memory_order_relaxed);
  }
  counts_.bytesSent.fetch_add(bytes + bulkBytes, std::memory_order_relaxed);
  counts_.unfinishedSends.fetch_add(1, std::memory_order_relaxed);
  const bool hasParts = !message->parts_.empty();
  if (hasParts) {
    counts_.bulkInFlight.fetch_add(1, std::memory_order_relaxed);
  }
  transport_.send(token, message->peer(), Channel::kFrame, message->frame_.data(), bytes, message);
  if (hasParts) { // otherwise it may be gone by now
    peer.out.push_back({message, 0, 0});
    pumpOut(token, message->peer());
  }
}

void Exchange::pumpOut(ProgressToken& token, int rank) {
  Peer& peer = *peers_[rank];
  if (peer.pumping) {
    return;
  }
  peer.pumping = true;
  while (peer.chunksOut < kChunksOut && !peer.out.empty() && peer.gone.empty()) {
    Peer::Stream& stream = peer.out.front();
    OutboundMessage* message = stream.message;
    const ConstSpan part = message->parts_[stream.part];
    const char* data = part.data + stream.offset;
    const size_t bytes = std::min(options_.bulkChunk, part.bytes - stream.offset);
    stream.offset += bytes;
    if (stream.offset == part.bytes) {
      stream.offset = 0;
      if (++stream.part == message->parts_.size()) {
        peer.out.pop_front();
      }
    }
    ++peer.chunksOut;
    transport_.send(token, rank, Channel::kBulk, data, bytes, new ChunkSend(*this, message));
  }
  peer.pumping = false;
}

void Exchange::finished(ProgressToken&, OutboundMessage* message) {
  counts_.unfinishedSends.fetch_sub(1, std::memory_order_relaxed);
  if (!message->parts_.empty()) {
    counts_.bulkInFlight.fetch_sub(1, std::memory_order_relaxed);
  }
  OutboundPtr owned(message);
  if (!owned->light()) {
    finished_.push_back(std::move(owned));
  }
}

void Exchange::sendFailed(ProgressToken& token, int peer, const std::string& reason) {
  dropPeer(token, peer, reason);
  listener_.onPeerGone(token, peer, reason);
}

void Exchange::sendWaiting(ProgressToken& token, int rank) {
  Peer& peer = *peers_[rank];
  while (!peer.waiting.empty() && hasCredit(peer, peer.waiting.front()->header().chargedBytes)) {
    OutboundPtr message = std::move(peer.waiting.front());
    peer.waiting.pop_front();
    peer.waitingCount.fetch_sub(1, std::memory_order_relaxed);
    counts_.waitingForCredit.fetch_sub(1, std::memory_order_relaxed);
    transmit(token, std::move(message));
  }
}

void Exchange::dropPeer(ProgressToken&, int rank, const std::string& reason) {
  Peer& peer = *peers_[rank];
  if (!peer.gone.empty()) {
    return;
  }
  peer.gone = reason;
  counts_.waitingForCredit.fetch_sub(peer.waiting.size(), std::memory_order_relaxed);
  for (OutboundPtr& message : peer.waiting) {
    failed_.emplace_back(std::move(message), reason);
  }
  peer.waiting.clear();
  peer.waitingCount = 0;
}

// ---- credits ----

void Exchange::released(int source, uint64_t chargedBytes) {
  Peer& peer = *peers_[source];
  const uint64_t requests = peer.releasedRequests.fetch_add(1) + 1;
  const uint64_t bytes = peer.releasedBytes.fetch_add(chargedBytes) + chargedBytes;
  const bool much =
      requests - peer.toldRequests >= options_.windowRequests / 2 || bytes - peer.toldBytes >= options_.windowBytes / 2;
  if (much && !peer.due.exchange(true)) {
    const std::lock_guard<std::mutex> lock(dueMutex_);
    duePeers_.push_back(source);
    due_ = true;
  }
}

bool Exchange::sendDueCredits(ProgressToken& token) {
  if (!hasDue()) {
    return false;
  }
  std::vector<int> due;
  {
    const std::lock_guard<std::mutex> lock(dueMutex_);
    due.swap(duePeers_);
    due_ = false;
  }
  for (const int rank : due) {
    peers_[rank]->due = false;
    reportCredit(token, rank);
  }
  return !due.empty();
}

void Exchange::reportStaleCredits(ProgressToken& token, std::chrono::steady_clock::time_point now) {
  if (closed_ || now < nextReport_) {
    return;
  }
  nextReport_ = now + kStale;
  for (int rank = 0; rank < static_cast<int>(peers_.size()); ++rank) {
    Peer& peer = *peers_[rank];
    const uint64_t released = peer.releasedRequests;
    if (released == peer.releasedAtLook) {
      reportCredit(token, rank);
    }
    peer.releasedAtLook = released;
  }
}

void Exchange::reportCredit(ProgressToken& token, int rank) {
  const Peer& peer = *peers_[rank];
  if (peer.gone.empty() && (peer.releasedRequests != peer.toldRequests || peer.releasedBytes != peer.toldBytes)) {
    transmit(token, std::make_unique<CreditMessage>(rank));
  }
}

// ---- receiving ----

bool Exchange::poll(ProgressToken& token) {
  if (closed_) {
    return false;
  }
  bool moved = sendDueCredits(token);
  moved |= transport_.poll(token) > 0;
  if (!fatal_.empty()) {
    throw std::runtime_error(fatal_);
  }
  return moved;
}

void Exchange::onFrame(ProgressToken& token, FrameBuffer frame, const OperationStatus& status) {
  if (!status.ok()) {
    listener_.onBadFrame(status.source, status.error);
    return;
  }
  counts_.bytesReceived.fetch_add(status.bytes, std::memory_order_relaxed);
  const auto header = parseFrame(frame.data(), status.bytes);
  if (!header) {
    const std::string bytes = std::to_string(status.bytes);
    listener_.onBadFrame(status.source, "a frame of " + bytes + " bytes that is not of this protocol or version");
    return;
  }
  if (header->kind != FrameKind::kDrain) {
    counts_.framesReceived.fetch_add(1, std::memory_order_relaxed);
  }
  Peer& peer = *peers_[status.source];
  peer.ackedRequests = header->releasedRequests;
  peer.ackedBytes = header->releasedBytes;
  sendWaiting(token, status.source);
  if (header->kind == FrameKind::kCredit) {
    return;
  }
  if (header->bodyInBulk != 0 || header->bulkParts != 0) {
    receiveBody(token, status.source, *header, std::move(frame));
    return;
  }
  InboundMessage message;
  message.source = status.source;
  message.header = *header;
  message.frame = std::move(frame);
  listener_.onMessage(token, std::move(message));
}

void Exchange::receiveBody(ProgressToken& token, int source, const FrameHeader& header, FrameBuffer frame) {
  auto inbound = std::make_unique<Inbound>();
  inbound->message.source = source;
  inbound->message.header = header;
  inbound->message.frame = std::move(frame);
  counts_.bulkInFlight.fetch_add(1, std::memory_order_relaxed);
  if (header.bodyInBulk != 0) {
    inbound->spans.push_back({nullptr, header.bodyBytes});
    try {
      inbound->message.separateBody.reset(new char[header.bodyBytes]);
      inbound->spans[0].data = inbound->message.separateBody.get();
    } catch (const std::bad_alloc&) {
      const std::string error = "there is no memory for a message of " + std::to_string(header.bodyBytes) + " bytes";
      if (header.bulkParts != 0) { // only the body would tell how long the parts are that follow
        counts_.bulkInFlight.fetch_sub(1, std::memory_order_relaxed);
        sendFailed(token, source, error);
        return;
      }
      inbound->message.error = error;
      inbound->discard = true;
    }
  } else {
    openParts(*inbound, source);
  }
  peers_[source]->in.push_back(std::move(inbound));
  pumpIn(token, source);
}

void Exchange::openParts(Inbound& inbound, int source) {
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
    message.target = listener_.makeTarget(source, message.header, {body.data + skip, body.bytes - skip});
    const auto same = [](const MutableSpan& a, const MutableSpan& b) { return a.bytes == b.bytes; };
    if (!std::equal(sizes.begin(), sizes.end(), message.target->parts.begin(), message.target->parts.end(), same)) {
      throw std::runtime_error("the sizes of its parts contradict each other");
    }
    inbound.spans = message.target->parts;
  } catch (const std::exception& error) {
    // The chunks come all the same; the stream goes on behind them.
    message.error = error.what();
    inbound.discard = true;
    inbound.spans = std::move(sizes);
  }
}

void Exchange::pumpIn(ProgressToken& token, int source) {
  Peer& peer = *peers_[source];
  while (peer.chunksIn < kChunksIn && !peer.in.empty()) {
    Inbound* inbound = peer.in.front().get();
    if (inbound->allPosted()) {
      return; // a body under way: its parts are not known yet
    }
    const MutableSpan span = inbound->spans[inbound->span];
    const size_t bytes = std::min(options_.bulkChunk, span.bytes - inbound->offset);
    char* data = inbound->discard ? nullptr : span.data + inbound->offset;
    inbound->offset += bytes;
    if (inbound->offset == span.bytes) {
      inbound->offset = 0;
      ++inbound->span;
    }
    ++inbound->chunks;
    ++peer.chunksIn;
    if (inbound->allPosted() && inbound->state == Inbound::State::kParts) {
      (void)peer.in.front().release(); // owned by its operations from here on
      peer.in.pop_front();
    }
    // Receiving into nothing makes MPI drop the chunk as truncated.
    transport_.receiveBulk(token, source, data, inbound->discard ? 0 : bytes, new ChunkReceive(*this, inbound));
  }
}

void Exchange::chunkReceived(ProgressToken& token, Inbound* inbound, const OperationStatus& status) {
  const int source = inbound->message.source;
  Peer& peer = *peers_[source];
  --peer.chunksIn;
  --inbound->chunks;
  counts_.bytesReceived.fetch_add(status.bytes, std::memory_order_relaxed);
  if (!status.ok() && !inbound->discard && inbound->message.error.empty()) {
    inbound->message.error = status.error;
  }
  if (inbound->chunks == 0 && inbound->allPosted()) {
    if (inbound->state == Inbound::State::kBody && !inbound->discard) {
      openParts(*inbound, source);
    }
    if (inbound->allPosted()) {
      counts_.bulkInFlight.fetch_sub(1, std::memory_order_relaxed);
      std::unique_ptr<Inbound> owned;
      if (!peer.in.empty() && peer.in.front().get() == inbound) {
        owned = std::move(peer.in.front()); // a body without parts
        peer.in.pop_front();
      } else {
        owned.reset(inbound);
      }
      listener_.onMessage(token, std::move(owned->message));
    }
  }
  pumpIn(token, source);
}

// ---- ending ----

std::vector<OutboundPtr> Exchange::takeFinished(ProgressToken&) {
  return std::exchange(finished_, {});
}

std::vector<std::pair<OutboundPtr, std::string>> Exchange::takeFailed(ProgressToken&) {
  return std::exchange(failed_, {});
}

bool Exchange::quiet(ProgressToken&) const {
  return counts_.unfinishedSends == 0 && counts_.bulkInFlight == 0 && counts_.waitingForCredit == 0;
}

void Exchange::close(ProgressToken& token, bool agreed) noexcept {
  if (!closed_) {
    closed_ = true;
    // Messages still under way to or from a peer that left are never freed: MPI may touch their memory later.
    for (const auto& peer : peers_) {
      for (std::unique_ptr<Inbound>& inbound : peer->in) {
        if (inbound->chunks > 0) {
          (void)inbound.release();
        }
      }
      peer->in.clear();
    }
    transport_.close(token, agreed);
  }
}

ExchangeCounts Exchange::counts() const {
  ExchangeCounts counts;
  counts.framesSent = counts_.framesSent;
  counts.framesReceived = counts_.framesReceived;
  counts.bytesSent = counts_.bytesSent;
  counts.bytesReceived = counts_.bytesReceived;
  counts.waitingForCredit = counts_.waitingForCredit;
  counts.bulkInFlight = counts_.bulkInFlight;
  counts.unfinishedSends = counts_.unfinishedSends;
  return counts;
}

} // namespace torch_rpc_mpi
