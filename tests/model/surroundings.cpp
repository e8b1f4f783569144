// What acts on the engine from outside: shutdown, the peer's process, the clock, the processors' store buffers.
#include "model/engine_model.h"

namespace model {

// Leaving::leave, ThreadedEngine::stop. The goodbye and the flush send what nobody here waits for.
bool EngineModel::stepOfStopper(State& s, Thread& t) {
  switch (t.at) {
    case At::kStop:
      step_ = "stop: stopping_, takes what is queued";
      if (s.mutex) {
        return false;
      }
      s.stopping = 1;
      t.tasks = s.requests | s.completions;
      s.requests = s.completions = 0;
      update(s);
      for (int i = 0; i < kEngineThreads; ++i) {
        s.threads[i].notified |= s.threads[i].at == At::kParked;
      }
      s.mutex = 1;
      if (is(Mutation::kStopSilent)) {
        t.at = At::kStopUnlock;
      } else {
        ring(t, At::kStopUnlock);
      }
      return true;
    case At::kStopUnlock:
      step_ = "stop: waits";
      s.mutex = 0;
      t.at = At::kStopJoin;
      return true;
    case At::kStopJoin: {
      bool userCode = false; // may run longer than the limit
      for (int i = 0; i < kEngineThreads; ++i) {
        userCode |= s.threads[i].at == At::kInnerWait;
      }
      if (threads(s) > 0 && !userCode) {
        return false;
      }
      step_ = userCode ? "stop: the limit is over" : "stop: the threads have ended";
      drop(s, t.tasks);
      t.at = At::kClose;
      return true;
    }
    case At::kClose:
      step_ = "shutdown: closes the exchange";
      if (s.token) {
        return false;
      }
      s.closed = 1;
      drop(s, s.arrivals);
      t.at = At::kFailAll;
      return true;
    case At::kFailAll:
      step_ = "shutdown: fails the calls that are left";
      s.callsClosed = 1;
      complete(s, s.calls);
      s.calls = 0;
      t.at = At::kDone;
      return true;
    default:
      return false;
  }
}

// Another process, awake: what it sends it stores into shared memory, and rings.
bool EngineModel::stepOfPeer(State& s, Thread& t) {
  if (t.at != At::kPeer) {
    return false;
  }
  std::array<Set, 8> messages{};
  int count = 0;
  for (const Set call : {Set{1}, Set{2}, kInnerCall}) {
    if (s.atPeer & call) {
      messages[count++] = call;
    }
  }
  const Set next = s.asked == 0 ? kFirstRequest : static_cast<Set>((s.asked << 1) & ~s.asked);
  if (next < (kFirstRequest << setup_.requests)) {
    messages[count++] = next;
  }
  if (setup_.peer == Peer::kLeaves) {
    messages[count++] = kGoodbye;
  }
  if (count == 0) {
    return false;
  }
  const Set message = messages[pick(count)];
  step_ = message == kGoodbye ? "says goodbye" : message & kCalls ? "answers" : "calls";
  s.atPeer &= ~message;
  s.asked |= message & kRequests;
  s.stored |= message;
  ring(t, message == kGoodbye ? At::kDone : At::kPeer);
  return true;
}

bool EngineModel::stepOfDeath(State& s) {
  step_ = "its process ends";
  const bool left = s.threads[kThePeer].at == At::kDone;
  if (s.peerEnded || (setup_.peer != Peer::kFails && !left)) {
    return false;
  }
  s.peerEnded = 1;
  s.threads[kThePeer] = Thread();
  s.inbox |= s.stored;
  s.stored = 0;
  return true;
}

bool EngineModel::stepOfClock(State& s) {
  step_ = "guestUntil_ is past";
  if (!s.guestUntil) {
    return false;
  }
  s.guestUntil = 0;
  return true;
}

bool EngineModel::stepOfMemory(State& s) {
  if (s.stored == 0 && !s.sleeperUnseen) {
    return false;
  }
  step_ = "what was stored is seen by all";
  s.inbox |= s.stored;
  s.stored = 0;
  s.sleeperUnseen = 0;
  return true;
}

} // namespace model
