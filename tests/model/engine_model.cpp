#include "model/engine_model.h"

#include <algorithm>
#include <cstring>

namespace model {

EngineModel::EngineModel(Setup setup, Mutation mutation) : setup_(std::move(setup)), mutation_(mutation) {
  for (size_t i = 0; i < setup_.callers.size(); ++i) {
    if (setup_.callers[i] == Caller::kCallsItself) {
      requestTasks_ |= 1 << i;
    }
  }
  completionTasks_ = static_cast<Set>(~requestTasks_);
}

State EngineModel::initial() const {
  State s;
  for (int i = 0; i < 2; ++i) { // ThreadedEngine::start
    spawn(s, 2);
  }
  for (size_t i = 0; i < setup_.callers.size(); ++i) {
    Thread& caller = s.threads[kEngineThreads + i];
    caller.at = At::kSend;
    caller.task = 1 << i;
  }
  s.threads[kThePeer].at = At::kPeer;
  if (setup_.stops) {
    s.threads[kTheStopper].at = At::kStop;
  }
  return s;
}

int EngineModel::actors() const {
  return kThreads + 3;
}

bool EngineModel::step(State& s, int actor, int choice) {
  choice_ = choice;
  choices_ = 1;
  violation_ = nullptr;
  if (actor >= kThreads) {
    return actor == kClock ? stepOfClock(s) : actor == kMemory ? stepOfMemory(s) : stepOfDeath(s);
  }
  Thread& t = s.threads[actor];
  using Step = bool (EngineModel::*)(State&, Thread&);
  for (const Step each :
       {&EngineModel::stepOfEngineThread, &EngineModel::stepOfTask, &EngineModel::stepOfLeader,
        &EngineModel::stepOfSleeper, &EngineModel::stepOfTurn, &EngineModel::stepOfPost, &EngineModel::stepOfSubmit,
        &EngineModel::stepOfCaller, &EngineModel::stepOfGuest, &EngineModel::stepOfStopper, &EngineModel::stepOfPeer}) {
    if ((this->*each)(s, t)) {
      return true;
    }
  }
  return false;
}

// Steps that read and write nothing but the thread's own, or what only it changes, or what changes once and for all;
// and those that give up the mutex, without which nobody could do anything with what it guards.
int EngineModel::unnoticed(const State& s) const {
  const bool callsEnd = setup_.stops || setup_.breaks || setup_.peer != Peer::kStays;
  for (int i = 0; i < kThreads; ++i) {
    const Thread& t = s.threads[i];
    bool quiet = false;
    switch (t.at) {
      case At::kRun:
        quiet = (t.task & kRequests) != 0;
        break;
      case At::kAwait:
        quiet = (s.completed & t.task) != 0;
        break;
      case At::kInnerWait:
        quiet = (s.completed & kInnerCall) != 0 && !setup_.stops;
        break;
      case At::kSend:
        quiet = !callsEnd && !has(Caller::kDrives);
        break;
      case At::kSendLook:
        quiet = setup_.peer == Peer::kStays;
        break;
      case At::kSubmittedReply:
        quiet = !has(Caller::kDrives) || !t.expectsReply || t.announced;
        break;
      case At::kTaskMayWait:
        quiet = i >= kEngineThreads;
        break;
      case At::kDriveIdle:
      case At::kStopUnlock:
        quiet = true;
        break;
      default:
        break;
    }
    if (quiet) {
      return i;
    }
  }
  return -1;
}

// The engine's threads are alike.
State EngineModel::canonical(const State& s) const {
  State result = s;
  std::sort(result.threads.begin(), result.threads.begin() + kEngineThreads, [](const Thread& a, const Thread& b) {
    return std::memcmp(&a, &b, sizeof(Thread)) < 0;
  });
  return result;
}

bool EngineModel::has(Caller kind) const {
  return std::find(setup_.callers.begin(), setup_.callers.end(), kind) != setup_.callers.end();
}

int EngineModel::pick(int choices) {
  choices_ = choices;
  return choice_;
}

void EngineModel::violate(const char* what) {
  violation_ = what;
}

void EngineModel::go(Thread& t, At& after) {
  t.at = after;
  after = At::kNowhere;
}

std::string EngineModel::name(int actor) const {
  std::string who;
  if (actor < kEngineThreads) {
    who = "engine thread " + std::to_string(actor);
  } else if (actor < kThePeer) {
    who = "caller " + std::to_string(actor - kEngineThreads);
  } else {
    who = std::array<const char*, 5>{"peer", "shutdown", "clock", "memory", "peer"}[actor - kThePeer];
  }
  return who + ": " + step_;
}

bool EngineModel::finished(const State& s) const {
  for (int i = kEngineThreads; i < kThePeer; ++i) {
    if (s.threads[i].at != At::kNowhere && s.threads[i].at != At::kDone) {
      return false;
    }
  }
  if (s.made != (s.ran | s.dropped)) {
    return false;
  }
  if (setup_.stops) {
    return s.threads[kTheStopper].at == At::kDone && threads(s) == 0;
  }
  if (s.requests != 0 || s.completions != 0 || running(s, requestTasks_) + running(s, completionTasks_) > 0) {
    return false;
  }
  if (s.broken) {
    return true;
  }
  if (s.outbox != 0 || s.inbox != 0) {
    return false;
  }
  if (setup_.peer != Peer::kStays) {
    return s.gone != Gone::kNo;
  }
  const Set all = static_cast<Set>((kFirstRequest << setup_.requests) - kFirstRequest);
  return s.stored == 0 && s.asked == all && s.answered == all;
}

} // namespace model
