#include "peer/exchange.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace {

// Posted at once: a burst this long needs no unexpected-message copy inside MPI.
constexpr size_t kFrameReceives = 32;
constexpr size_t kFrameReceivesOfSource = 2; // at least
constexpr size_t kDescriptorSpace = 1024;    // a frame holds the eager limit and the description of some tensors
// Errors that name no peer, and nothing else for so long: it is the transport that is broken, not a peer whose process
// has ended, of which more would be heard by then.
constexpr auto kErrorsOfNobody = std::chrono::seconds(1);
constexpr auto kStale = std::chrono::microseconds(300); // longer than most calls take, whose responses report as well

} // namespace

struct Exchange::FrameReceive final : Operation {
  FrameReceive(Exchange& owner, int from) : exchange(owner), source(from) {}
  void complete(ProgressToken& token, const OperationStatus& status) noexcept override {
    FrameBuffer arrived = std::move(buffer);
    OperationStatus known = status;
    if (source != kAnySource) {
      known.source = source; // an error need not tell it
    }
    try {
      if (source == kAnySource || !exchange.peers_[source]->ended()) {
        exchange.postFrameReceive(token, this);
      }
      exchange.onFrame(token, std::move(arrived), known);
    } catch (const std::exception& error) {
      exchange.fatal_ = errorText(error);
    }
  }
  Exchange& exchange;
  const int source;
  FrameBuffer buffer;
};

size_t ExchangeOptions::frameBytes() const {
  return sizeof(FrameHeader) + eagerLimit + kDescriptorSpace;
}

Exchange::Exchange(Transport& transport, ExchangeListener& listener, const ExchangeOptions& options)
    : transport_(transport),
      listener_(listener),
      options_(options),
      frames_(std::make_shared<FramePool>(options.frameBytes())),
      windows_(options.untakenBudget, transport.size()),
      context_{transport, listener, options_, *frames_, counters_, done_, windows_, kept_, blocked_, atDevice_} {
  for (std::vector<int>* peers : {&blocked_, &wereBlocked_, &atDevice_, &wereAtDevice_}) {
    peers->reserve(2 * static_cast<size_t>(transport.size())); // each direction names a peer once
  }
  for (int rank = 0; rank < transport.size(); ++rank) {
    peers_.push_back(std::make_unique<Peer>(rank, context_, static_cast<PeerFailureListener&>(*this)));
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
  if (closed_ || peer.state() != Peer::State::kOpen) {
    done_.failed.emplace_back(std::move(message), closed_ ? "RPC was shut down" : peer.reason());
    return;
  }
  peer.outgoing.post(token, std::move(message));
}

OutboundPtr Exchange::forget(ProgressToken& token, int rank, uint64_t callId) {
  Peer& peer = *peers_[rank];
  return !closed_ && peer.state() == Peer::State::kOpen ? peer.outgoing.forget(token, callId) : nullptr;
}

void Exchange::drop(ProgressToken&, OutboundPtr message) {
  done_.sent.push_back(std::move(message));
}

bool Exchange::receives(ProgressToken&, int rank) const {
  return peers_[rank]->incoming.unfinished() > 0;
}

bool Exchange::wouldSendAtOnce(int rank, uint64_t chargedBytes) const {
  return peers_[rank]->outgoing.wouldSendAtOnce(chargedBytes);
}

void Exchange::released(int source, uint64_t chargedBytes) {
  if (peers_[source]->credit.released(chargedBytes)) {
    due_.tellCredit(source);
  }
}

void Exchange::refuse(int source, const std::string& why) {
  due_.refuse(source, why);
}

bool Exchange::sendBlocked(ProgressToken& token) {
  bool any = false;
  blocked_.swap(wereBlocked_);
  for (const int rank : wereBlocked_) {
    any = peers_[rank]->outgoing.tryAgain(token) || any;
  }
  wereBlocked_.clear();
  return any;
}

bool Exchange::moveAtDevice(ProgressToken& token) {
  if (atDevice_.empty()) {
    return false;
  }
  bool any = false;
  atDevice_.swap(wereAtDevice_);
  for (const int rank : wereAtDevice_) {
    Peer& peer = *peers_[rank];
    any = (peer.outgoing.awaitsDevice() && peer.outgoing.tryDevice(token)) || any;
    any = (peer.incoming.awaitsDevice() && peer.incoming.tryDevice(token)) || any;
  }
  wereAtDevice_.clear();
  return any;
}

// In frames of their own, where nothing else has told them meanwhile.
void Exchange::reportCredit(ProgressToken& token, const std::vector<int>& ranks) {
  for (const int rank : ranks) {
    Peer& peer = *peers_[rank];
    if (peer.state() == Peer::State::kOpen && peer.credit.unreported()) {
      peer.outgoing.reportCredit(token);
    }
  }
}

// ---- receiving ----

bool Exchange::poll(ProgressToken& token) {
  const DuePeers::Due due = due_.take();
  for (const auto& [rank, why] : due.refused) {
    fail(token, rank, why);
  }
  for (const int rank : due.credit) {
    peers_[rank]->credit.tellsAgain();
  }
  if (closed_) {
    return false; // but nothing stays due, for which a sender would turn for ever
  }
  reportCredit(token, due.credit);
  const bool received = transport_.poll(token) > 0;
  const bool atDevice = moveAtDevice(token);
  const bool moved = sendBlocked(token) || received || atDevice || !due.credit.empty();
  if (!fatal_.empty()) {
    throw std::runtime_error(fatal_);
  }
  return moved;
}

void Exchange::onFrame(ProgressToken& token, FrameBuffer frame, const OperationStatus& status) {
  const int source = status.source;
  if (source < 0 || source >= transport_.size()) {
    listener_.onStrayFrame(source, status.ok() ? "its source is no rank of the group" : status.error);
    if (!status.ok()) {
      const auto now = Clock::now();
      errorsOfNobodySince_ = errorsOfNobodySince_.value_or(now);
      if (now - *errorsOfNobodySince_ >= kErrorsOfNobody) {
        fatal_ = "frames can no longer be received: " + status.error;
      }
    }
    return;
  }
  errorsOfNobodySince_.reset();
  if (peers_[source]->ended()) {
    counters_.framesDropped.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  if (!status.ok()) {
    fail(token, source, "a frame of it could not be received: " + status.error);
    return;
  }
  try {
    onFrameOf(token, source, std::move(frame), status.bytes);
  } catch (const std::exception& error) {
    fail(token, source, errorText(error));
  }
}

void Exchange::onFrameOf(ProgressToken& token, int source, FrameBuffer frame, size_t bytes) {
  Peer& peer = *peers_[source];
  counters_.bytesReceived.fetch_add(bytes, std::memory_order_relaxed);
  const auto header = parseFrame(frame.data(), bytes);
  if (!header) {
    throw std::runtime_error(
        "it sent a frame of " + std::to_string(bytes) +
        " bytes that is not of this protocol or version. Every rank has to use the same build of torch_rpc_mpi");
  }
  const std::string impossible = peer.credit.acknowledged(*header);
  if (!impossible.empty()) {
    throw std::runtime_error("it sent a frame that makes no sense: " + impossible);
  }
  if (peer.state() == Peer::State::kOpen) {
    peer.outgoing.sendWaiting(token);
    if (peer.ended()) { // what was sent failed at once
      counters_.framesDropped.fetch_add(1, std::memory_order_relaxed);
      return;
    }
  }
  if (header->kind == FrameKind::kBatch) {
    takeApart(token, source, frame, *header);
  } else {
    deliver(token, source, std::move(frame), *header);
  }
}

void Exchange::takeApart(ProgressToken& token, int source, const FrameBuffer& batch, const FrameHeader& header) {
  ConstSpan rest{batch.body(), header.bodyBytes};
  while (rest.bytes > 0 && !peers_[source]->ended()) {
    const auto next = parseFrameOfBatch(rest);
    if (!next) {
      throw std::runtime_error("it sent a batch of frames that makes no sense");
    }
    const size_t bytes = sizeof(FrameHeader) + next->bodyBytes;
    FrameBuffer frame = frames_->get();
    std::memcpy(frame.data(), rest.data, bytes);
    rest = {rest.data + bytes, rest.bytes - bytes};
    deliver(token, source, std::move(frame), *next);
  }
}

void Exchange::deliver(ProgressToken& token, int source, FrameBuffer frame, const FrameHeader& header) {
  if (header.kind != FrameKind::kDrain) {
    counters_.framesReceived.fetch_add(1, std::memory_order_relaxed);
  }
  if (header.kind == FrameKind::kCredit) {
    return;
  }
  InboundMessage message;
  message.source = source;
  message.header = header;
  message.frame = std::move(frame);
  if (header.bodyInBulk != 0 || header.bulkParts != 0) {
    peers_[source]->incoming.receive(token, std::move(message));
  } else {
    listener_.onMessage(token, std::move(message));
  }
}

// ---- ending ----

void Exchange::leaves(ProgressToken& token, int rank, const std::string& cause, Time now) {
  Peer& peer = *peers_[rank];
  peer.leaves(token, listener_.failureText(rank, cause), now);
  if (peer.hasLeft(now)) {
    peer.end(token, Peer::State::kGone, peer.reason());
  }
}

void Exchange::fail(ProgressToken& token, int rank, const std::string& cause) {
  Peer& peer = *peers_[rank];
  if (!peer.ended()) {
    peer.end(token, Peer::State::kFailed, listener_.failureText(rank, cause));
  }
}

void Exchange::onPeerFailed(ProgressToken& token, int rank, const std::string& reason) noexcept {
  try {
    fail(token, rank, reason);
  } catch (const std::exception& error) { // no memory to tell it
    fatal_ = errorText(error);
  }
}

void Exchange::look(ProgressToken& token, Time now) {
  if (closed_ || now < nextStaleLook_) {
    return;
  }
  nextStaleLook_ = now + kStale;
  std::vector<int> stale;
  for (int rank = 0; rank < transport_.size(); ++rank) {
    Peer& peer = *peers_[rank];
    if (peer.credit.stale()) {
      stale.push_back(rank);
    }
    if (peer.hasLeft(now)) {
      peer.end(token, Peer::State::kGone, peer.reason());
    }
  }
  reportCredit(token, stale);
  giveBackMemory();
}

// Of what was posted to peers that have ended.
void Exchange::giveBackMemory() {
  std::erase_if(
      kept_, [&](OutboundMessage* message) { return peers_[message->peer()]->ended() && message->giveBackMemory(); });
}

DoneMessages Exchange::takeDone(ProgressToken&) {
  return std::exchange(done_, {});
}

bool Exchange::quiet(ProgressToken&) const {
  return counters_.allSent() && counters_.partsIn == 0 && counters_.waitingForCredit == 0;
}

void Exchange::close(ProgressToken& token, bool agreed) noexcept {
  if (std::exchange(closed_, true)) {
    return;
  }
  for (auto& peer : peers_) {
    try {
      peer->outgoing.sendGoodbye(token);
    } catch (const std::exception&) { // no memory: the peer finds out otherwise
    }
    peer->incoming.abandon();
  }
  if (transport_.close(token, agreed) > 0) {
    // Of those that were not cancelled in time MPI may still write to the buffers.
    for (auto& receive : receives_) {
      (void)receive.release();
    }
  }
}

} // namespace torch_rpc_mpi
