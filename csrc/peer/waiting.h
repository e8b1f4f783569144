// The messages to one peer that cannot leave yet.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <unordered_map>

#include "peer/credit.h"
#include "peer/peer_context.h"

namespace torch_rpc_mpi {

// Everything is guarded by the progress token but wouldWait().
class Waiting {
 public:
  Waiting(Credit& credit, ExchangeCounters& counters)
      : credit_(credit),
        large_(counters.waitingForCredit),
        small_(counters.waitingForCredit),
        answers_(counters.waitingUntaken) {}

  void add(OutboundPtr message);
  // The next to leave; null if none waits, but for credit. Answers and requests take turns, so that neither starves.
  OutboundMessage* next();
  OutboundPtr takeNext();                   // after next(), which found one
  OutboundPtr takeRequest(uint64_t callId); // null if it does not wait
  bool holdsRequest(uint64_t callId) const {
    return places_.contains(callId);
  }
  OutboundPtr takeGoodbye(); // likewise
  OutboundPtr takeAny();     // likewise
  // Whether such a message has to wait, if only for credit and behind others. Of requests any thread may ask, as a
  // hint.
  bool wouldWait(bool request, uint64_t chargedBytes) const;

 private:
  using Queue = std::list<OutboundPtr>;
  struct Lane {
    explicit Lane(std::atomic<uint64_t>& counter) : countOfAll(counter) {}
    Queue waiting;
    std::atomic<size_t> count{0};
    std::atomic<uint64_t>& countOfAll; // peers
  };
  Lane& laneOf(bool request, uint64_t chargedBytes) {
    return !request ? answers_ : chargedBytes == 0 ? small_ : large_;
  }
  const Lane& laneOf(bool request, uint64_t chargedBytes) const {
    return !request ? answers_ : chargedBytes == 0 ? small_ : large_;
  }
  Lane* nextLane();
  OutboundPtr take(Lane& lane, Queue::iterator place);

  Credit& credit_;
  Lane large_, small_;                                   // requests
  Lane answers_;                                         // and control frames
  std::unordered_map<uint64_t, Queue::iterator> places_; // of requests, by call
  bool answersTurn_ = true;
};

} // namespace torch_rpc_mpi
