#include "peer/exchange.h"

#include <algorithm>
#include <utility>

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace {

// Posted at once: a burst this long needs no unexpected-message copy inside MPI.
constexpr size_t kFrameReceives = 32;
constexpr size_t kFrameReceivesOfSource = 2; // at least
constexpr size_t kChunksOut = 4;             // per peer; enough to keep a link busy while the next is posted
constexpr size_t kDescriptorSpace = 1024;    // a frame holds the eager limit and the description of some tensors

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
  FrameReceive(Exchange& owner, int from) : exchange(owner), source(from) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    FrameBuffer arrived = std::move(buffer);
    try {
      exchange.postFrameReceive(token, this);
      exchange.onFrame(token, std::move(arrived), status);
    } catch (const std::exception& error) {
      exchange.fatal_ = errorText(error);
    }
  }
  Exchange& exchange;
  const int source;
  FrameBuffer buffer;
};

struct Exchange::Peer {
  struct Lane {
    std::deque<OutboundPtr> waiting;     // for credit
    std::atomic<size_t> waitingCount{0}; // an atomic because wouldSendAtOnce() looks at it
  };
  std::string gone; // why nothing is sent to it any more
  Lane large, small;
  Lane& laneOf(uint64_t chargedBytes) {
    return chargedBytes == 0 ? small : large;
  }

  struct Stream {
    OutboundMessage* message;
    size_t part;
    size_t offset;
  };
  std::deque<Stream> out;
  size_t chunksOut = 0;
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

size_t ExchangeOptions::frameBytes() const {
  return sizeof(FrameHeader) + eagerLimit + kDescriptorSpace;
}

Exchange::Exchange(Transport& transport, ExchangeListener& listener, ExchangeOptions options)
    : transport_(transport),
      listener_(listener),
      options_(options),
      frames_(std::make_shared<FramePool>(options.frameBytes())),
      credits_(transport.size(), options.windowRequests, options.windowBytes),
      bulkReceiver_(transport, listener, options.bulkChunk) {
  for (int rank = 0; rank < transport.size(); ++rank) {
    peers_.push_back(std::make_unique<Peer>());
  }
}

Exchange::~Exchange() = default;

void Exchange::start(ProgressToken& token) {
  const std::vector<int> sources = transport_.frameSources();
  for (const int source : sources) {
    for (size_t i = 0; i < std::max(kFrameReceives / sources.size(), kFrameReceivesOfSource); ++i) {
      receives_.push_back(std::make_unique<FrameReceive>(*this, source));
      postFrameReceive(token, receives_.back().get());
    }
  }
}

void Exchange::postFrameReceive(ProgressToken& token, FrameReceive* slot) {
  slot->buffer = frames_->get();
  transport_.receiveFrame(token, slot->source, slot->buffer.data(), slot->buffer.capacity(), slot);
}

// ---- sending ----

void Exchange::post(ProgressToken& token, OutboundPtr message) {
  Peer& peer = *peers_[message->peer()];
  if (closed_ || !peer.gone.empty()) {
    failed_.emplace_back(std::move(message), closed_ ? "RPC was shut down" : peer.gone);
    return;
  }
  Peer::Lane& lane = peer.laneOf(message->header().chargedBytes);
  if (message->needsCredit() &&
      (!lane.waiting.empty() || !credits_.allows(message->peer(), message->header().chargedBytes))) {
    lane.waiting.push_back(std::move(message));
    lane.waitingCount.fetch_add(1, std::memory_order_relaxed);
    counts_.waitingForCredit.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  transmit(token, std::move(message));
}

bool Exchange::wouldSendAtOnce(int rank, uint64_t chargedBytes) const {
  const Peer::Lane& lane = peers_[rank]->laneOf(chargedBytes);
  return lane.waitingCount.load(std::memory_order_relaxed) == 0 && credits_.allows(rank, chargedBytes);
}

void Exchange::transmit(ProgressToken& token, OutboundPtr owned) {
  if (!owned->encoded()) {
    try {
      owned->encode(*frames_);
    } catch (const std::exception& error) {
      failed_.emplace_back(std::move(owned), errorText(error));
      return;
    }
  }
  OutboundMessage* message = owned.release(); // its operations own it until finished()
  Peer& peer = *peers_[message->peer()];
  FrameHeader& header = message->header_;
  if (message->needsCredit()) {
    credits_.sent(message->peer(), header.chargedBytes);
  }
  credits_.report(message->peer(), header);
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
  for (Peer::Lane* lane : {&peer.large, &peer.small}) { // the large first, which small ones would keep waiting
    while (!lane->waiting.empty() && credits_.allows(rank, lane->waiting.front()->header().chargedBytes)) {
      OutboundPtr message = std::move(lane->waiting.front());
      lane->waiting.pop_front();
      lane->waitingCount.fetch_sub(1, std::memory_order_relaxed);
      counts_.waitingForCredit.fetch_sub(1, std::memory_order_relaxed);
      transmit(token, std::move(message));
    }
  }
}

void Exchange::dropPeer(ProgressToken&, int rank, const std::string& reason) {
  Peer& peer = *peers_[rank];
  if (!peer.gone.empty()) {
    return;
  }
  peer.gone = reason;
  for (Peer::Lane* lane : {&peer.large, &peer.small}) {
    counts_.waitingForCredit.fetch_sub(lane->waiting.size(), std::memory_order_relaxed);
    for (OutboundPtr& message : lane->waiting) {
      failed_.emplace_back(std::move(message), reason);
    }
    lane->waiting.clear();
    lane->waitingCount = 0;
  }
}

void Exchange::reportStaleCredits(ProgressToken& token, std::chrono::steady_clock::time_point now) {
  if (!closed_) {
    reportCredits(token, credits_.takeStale(now));
  }
}

void Exchange::reportCredits(ProgressToken& token, const std::vector<int>& ranks) {
  for (const int rank : ranks) {
    if (peers_[rank]->gone.empty() && credits_.unreported(rank)) {
      transmit(token, std::make_unique<CreditMessage>(rank));
    }
  }
}

// ---- receiving ----

bool Exchange::poll(ProgressToken& token) {
  const std::vector<int> due = credits_.takeDue();
  if (closed_) {
    return false; // but nothing stays due, for which a sender would turn for ever
  }
  reportCredits(token, due);
  const bool moved = transport_.poll(token) > 0 || !due.empty();
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
  credits_.acknowledged(status.source, *header);
  sendWaiting(token, status.source);
  if (header->kind == FrameKind::kCredit) {
    return;
  }
  InboundMessage message;
  message.source = status.source;
  message.header = *header;
  message.frame = std::move(frame);
  if (header->bodyInBulk != 0 || header->bulkParts != 0) {
    const std::string lost = bulkReceiver_.receive(token, std::move(message));
    if (!lost.empty()) {
      sendFailed(token, status.source, lost);
    }
    return;
  }
  listener_.onMessage(token, std::move(message));
}

// ---- ending ----

std::vector<OutboundPtr> Exchange::takeFinished(ProgressToken&) {
  return std::exchange(finished_, {});
}

std::vector<std::pair<OutboundPtr, std::string>> Exchange::takeFailed(ProgressToken&) {
  return std::exchange(failed_, {});
}

bool Exchange::quiet(ProgressToken&) const {
  return counts_.unfinishedSends == 0 && bulkReceiver_.inFlight() == 0 && counts_.waitingForCredit == 0;
}

void Exchange::close(ProgressToken& token, bool agreed) noexcept {
  if (!closed_) {
    closed_ = true;
    bulkReceiver_.close();
    transport_.close(token, agreed);
  }
}

ExchangeCounts Exchange::counts() const {
  ExchangeCounts counts;
  counts.framesSent = counts_.framesSent;
  counts.framesReceived = counts_.framesReceived;
  counts.bytesSent = counts_.bytesSent;
  counts.bytesReceived = counts_.bytesReceived + bulkReceiver_.bytesReceived();
  counts.waitingForCredit = counts_.waitingForCredit;
  counts.bulkInFlight = counts_.bulkInFlight + bulkReceiver_.inFlight();
  counts.unfinishedSends = counts_.unfinishedSends;
  return counts;
}

} // namespace torch_rpc_mpi
