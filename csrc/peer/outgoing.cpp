#include "peer/outgoing.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "base/error_text.h"
#include "peer/outbound_control.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kAskedInTurn = 16; // messages, whether they are ready
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

Outgoing::Outgoing(int rank, Credit& credit, PeerContext& context, PeerFailureListener& owner)
    : rank_(rank),
      credit_(credit),
      context_(context),
      gate_(rank, context),
      sending_(rank, credit, context, gate_, owner),
      waiting_(credit, context.counters) {}

void Outgoing::post(ProgressToken& token, OutboundPtr message) {
  const bool waits =
      gate_.framesBlocked() || waiting_.wouldWait(message->needsCredit(), message->header().chargedBytes);
  if (waits || !gate_.allows(token, Channel::kFrame)) {
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
    sending_.transmit(token, gather(std::move(message)));
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
  gate_.awaitDevice();
}

void Outgoing::failCharged(OutboundPtr message, const std::string& error) {
  giveBackCredit(*message);
  context_.done.failed.emplace_back(std::move(message), error);
}

// Messages overtake each other here, as they may at the callee.
bool Outgoing::tryDevice(ProgressToken& token) {
  gate_.askDevice();
  bool any = false;
  // A peer that fails meanwhile takes all of them along.
  for (size_t left = std::min(staged_.size(), kAskedInTurn);
       left > 0 && !staged_.empty() && gate_.allows(token, Channel::kFrame); --left) {
    OutboundPtr message = std::move(staged_.front());
    staged_.pop_front();
    context_.counters.waitingForDevice.fetch_sub(1, std::memory_order_relaxed);
    if (!stage(message)) {
      sending_.transmit(token, std::move(message));
      any = true;
    }
  }
  if (!staged_.empty() && !gate_.framesBlocked()) { // else tryAgain() does
    gate_.awaitDevice();
  }
  const bool waited = sendWaiting(token); // for the credit of one that failed
  return sending_.pump(token) || any || waited;
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

bool Outgoing::wouldSendAtOnce(uint64_t chargedBytes) const {
  return !waiting_.wouldWait(/*request=*/true, chargedBytes);
}

void Outgoing::reportCredit(ProgressToken& token) {
  if (!gate_.framesBlocked() && gate_.allows(token, Channel::kFrame)) {
    send(token, std::make_unique<OutboundControl>(rank_, FrameKind::kCredit));
  }
}

bool Outgoing::sendWaiting(ProgressToken& token) {
  bool any = false;
  while (!gate_.framesBlocked() && waiting_.next() != nullptr && gate_.allows(token, Channel::kFrame)) {
    send(token, waiting_.takeNext());
    any = true;
  }
  return any;
}

bool Outgoing::tryAgain(ProgressToken& token) {
  gate_.askAgain();
  const bool frames = sendWaiting(token);
  if (!staged_.empty()) {
    gate_.awaitDevice();
  }
  return sending_.pump(token) || frames;
}

void Outgoing::sendGoodbye(ProgressToken& token) {
  OutboundPtr goodbye = waiting_.takeGoodbye();
  if (goodbye != nullptr && encode(*goodbye).empty()) {
    sending_.transmit(token, std::move(goodbye));
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
  sending_.sentInBatch(std::move(message));
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

void Outgoing::abandon(ProgressToken& token, const std::string& reason) {
  while (OutboundPtr message = waiting_.takeAny()) {
    context_.done.failed.emplace_back(std::move(message), reason);
  }
  for (OutboundPtr& message : std::exchange(staged_, {})) {
    context_.counters.waitingForDevice.fetch_sub(1, std::memory_order_relaxed);
    context_.done.failed.emplace_back(std::move(message), reason);
  }
  sending_.abandon(token);
}

} // namespace torch_rpc_mpi
