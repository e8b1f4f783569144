#include "peer/waiting.h"

#include <iterator>
#include <utility>

namespace torch_rpc_mpi {

void Waiting::add(OutboundPtr message) {
  Lane& lane = laneOf(message->needsCredit(), message->header().chargedBytes);
  lane.waiting.push_back(std::move(message));
  lane.count.fetch_add(1, std::memory_order_relaxed);
  lane.countOfAll.fetch_add(1, std::memory_order_relaxed);
  if (&lane != &answers_) {
    places_[lane.waiting.back()->header().callId] = std::prev(lane.waiting.end());
  }
}

OutboundPtr Waiting::take(Lane& lane, Queue::iterator place) {
  OutboundPtr message = std::move(*place);
  lane.waiting.erase(place);
  lane.count.fetch_sub(1, std::memory_order_relaxed);
  lane.countOfAll.fetch_sub(1, std::memory_order_relaxed);
  if (&lane != &answers_) {
    places_.erase(message->header().callId);
  }
  return message;
}

Waiting::Lane* Waiting::nextLane() {
  if (answersTurn_ && !answers_.waiting.empty()) {
    return &answers_;
  }
  for (Lane* lane : {&large_, &small_}) { // the large first, which small ones would keep waiting
    if (!lane->waiting.empty() && credit_.allows(lane->waiting.front()->header().chargedBytes)) {
      return lane;
    }
  }
  return answers_.waiting.empty() ? nullptr : &answers_;
}

OutboundMessage* Waiting::next() {
  const Lane* lane = nextLane();
  return lane == nullptr ? nullptr : lane->waiting.front().get();
}

OutboundPtr Waiting::takeNext() {
  Lane* lane = nextLane();
  answersTurn_ = lane != &answers_;
  return take(*lane, lane->waiting.begin());
}

OutboundPtr Waiting::takeRequest(uint64_t callId) {
  const auto found = places_.find(callId);
  if (found == places_.end()) {
    return nullptr;
  }
  const Queue::iterator place = found->second;
  return take(laneOf(/*request=*/true, (*place)->header().chargedBytes), place);
}

OutboundPtr Waiting::takeGoodbye() {
  Queue& waiting = answers_.waiting;
  const bool found = !waiting.empty() && waiting.back()->header().kind == FrameKind::kGoodbye;
  return found ? take(answers_, std::prev(waiting.end())) : nullptr;
}

OutboundPtr Waiting::takeAny() {
  for (Lane* lane : {&large_, &small_, &answers_}) {
    if (!lane->waiting.empty()) {
      return take(*lane, lane->waiting.begin());
    }
  }
  return nullptr;
}

bool Waiting::wouldWait(bool request, uint64_t chargedBytes) const {
  if (!request) {
    return false;
  }
  const size_t before = laneOf(request, chargedBytes).count.load(std::memory_order_relaxed);
  return before > 0 || !credit_.allows(chargedBytes);
}

} // namespace torch_rpc_mpi
