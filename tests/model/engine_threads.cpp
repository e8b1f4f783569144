// What the engine's own threads do.
#include "model/engine_model.h"

namespace model {

namespace {

Set lowest(Set set) {
  return static_cast<Set>(set & -set);
}

} // namespace

// ---- ThreadedEngine::nextTask, standBy ----

bool EngineModel::stepOfEngineThread(State& s, Thread& t) {
  switch (t.at) {
    case At::kNext:
      return !s.mutex && nextTask(s, t);
    case At::kTicking: // wait_for: it ends at any moment, notified or not
      if (s.mutex) {
        return false;
      }
      look(s);
      t.at = At::kNext;
      t.mayLead = s.called || !s.ledSince || !setup_.oneCore;
      s.called = 0;
      s.ledSince = 0;
      return nextTask(s, t);
    case At::kParked:
      if (!t.notified || s.mutex) {
        return false;
      }
      t.notified = 0;
      t.mayLead = 1;
      return nextTask(s, t);
    default:
      return false;
  }
}

// One round of its loop, in one step: what it reads beside what the mutex guards are guest_ and guestUntil_, which come
// to the same in any order, and asleep_, which nobody changes while nobody leads.
bool EngineModel::nextTask(State& s, Thread& t) {
  if (s.stopping) {
    step_ = "nextTask: stopping_, the thread ends";
    t = Thread();
    t.at = At::kDone;
  } else if (take(s, t)) {
    step_ = "nextTask: takes a task";
    t.at = At::kRun;
  } else if (t.mayLead && !s.leading && !s.broken && !s.guest && !s.guestUntil) {
    step_ = "nextTask: begins to lead";
    s.leading = 1;
    s.ledSince = ticking(s) && setup_.oneCore;
    if (!ticking(s) && backlog(s)) {
      notifyParked(s);
    }
    t.spinning = 1;
    t.at = At::kLead;
  } else {
    standBy(s, t);
  }
  return true;
}

void EngineModel::standBy(State& s, Thread& t) {
  t.mayLead = 0;
  t.notified = 0;
  const bool parks = is(Mutation::kParksForGuest) && (s.guest || s.guestUntil);
  if (!parks && !ticking(s) && !s.broken && (!s.asleep || backlog(s))) {
    s.called = 0;
    s.ledSince = 0;
    step_ = "standBy: ticks";
    t.at = At::kTicking;
  } else {
    step_ = "standBy: parks";
    t.at = At::kParked;
  }
}

bool EngineModel::take(State& s, Thread& t) {
  if (!runnable(s)) {
    return false;
  }
  const auto idle = [&] { return threads(s) - running(s, requestTasks_) - running(s, completionTasks_); };
  const bool completes = mayRun(s, completionTasks_) && !is(Mutation::kLastTakesNothing);
  if (!is(Mutation::kTakesLastThread) && idle() < 3 && !spawn(s, setup_.engineThreads) && idle() < 2 && !completes) {
    return false;
  }
  Set& queue = mayRun(s, completionTasks_) ? s.completions : s.requests;
  t.task = lowest(queue); // the order within a lane makes no difference here
  queue &= ~t.task;
  update(s);
  if (!ticking(s) && !is(Mutation::kTakeSilent)) {
    notifyParked(s);
  }
  return true;
}

bool EngineModel::spawn(State& s, int limit) {
  int started = 0;
  Thread* free = nullptr;
  for (int i = 0; i < kEngineThreads; ++i) {
    if (s.threads[i].at == At::kNowhere) {
      free = &s.threads[i];
    } else {
      ++started;
    }
  }
  if (started >= limit) {
    return false;
  }
  free->at = At::kNext;
  free->mayLead = 1;
  return true;
}

void EngineModel::wakeIdleThread(State& s) const {
  if (ticking(s)) {
    s.called = setup_.oneCore;
  } else {
    notifyParked(s);
  }
}

// Parked threads are all alike, so that it does not matter which.
void EngineModel::notifyParked(State& s) {
  for (int i = 0; i < kEngineThreads; ++i) {
    if (s.threads[i].at == At::kParked && !s.threads[i].notified) {
      s.threads[i].notified = 1;
      return;
    }
  }
}

bool EngineModel::ticking(const State& s) {
  for (int i = 0; i < kEngineThreads; ++i) {
    if (s.threads[i].at == At::kTicking) {
      return true;
    }
  }
  return false;
}

// ---- ThreadedEngine::threadMain, and what tasks do ----

bool EngineModel::stepOfTask(State& s, Thread& t) {
  switch (t.at) {
    case At::kRun:
      step_ = "threadMain: runs a task";
      if ((s.ran | s.dropped) & t.task) {
        violate("a task runs twice, or after it was dropped");
      }
      s.ran |= t.task;
      t.at = At::kTaskEnded;
      if (t.task & completionTasks_) {
        complete(s, t.task);
      } else if (t.task & kCalls) { // OwnRequestTask
        if (s.calls & t.task) {
          s.calls &= ~t.task;
          complete(s, t.task);
        }
      } else if (setup_.innerCall && t.task == kFirstRequest) {
        t.at = At::kInnerCall;
      } else if (setup_.waits & t.task) {
        t.at = At::kMeet;
      } else {
        submit(t, t.task, At::kTaskEnded);
      }
      return true;
    case At::kInnerCall:
      step_ = "a user's function calls the peer";
      if (s.callsClosed) {
        submit(t, t.task, At::kTaskEnded);
      } else {
        call(s, t, kInnerCall, At::kInnerWait);
      }
      return true;
    case At::kInnerWait:
      step_ = "a user's function has its answer";
      if (!(s.completed & kInnerCall)) {
        return false;
      }
      submit(t, t.task, At::kTaskEnded);
      return true;
    case At::kMeet:
      step_ = "a user's function has seen the other one's effect";
      if (!(setup_.callers.empty() ? s.answered & ~t.task : s.completed & kCalls)) {
        return false;
      }
      submit(t, t.task, At::kTaskEnded);
      return true;
    case At::kTaskEnded:
      if (s.mutex) {
        return false;
      }
      t.task = 0;
      t.waiting = 0;
      t.mayLead = 1;
      update(s);
      return nextTask(s, t);
    default:
      return false;
  }
}

// ---- ThreadedEngine::lead ----

bool EngineModel::stepOfLeader(State& s, Thread& t) {
  switch (t.at) {
    case At::kLead:
      if (s.stopping) {
        step_ = "lead: stopping_";
        t.at = At::kLeadEnd;
      } else if (t.spinning) {
        step_ = "lead: turnOnce()";
        turnOnce(s, t, At::kLeadTurned);
      } else {
        step_ = "sleep: Doorbell::prepare() counts a sleeper";
        ++s.sleepers;
        s.sleeperUnseen = is(Mutation::kPrepareUnordered);
        t.at = At::kTicket;
      }
      return true;
    case At::kLeadTurned:
      t.at = t.queued ? At::kLeadSenders : At::kLeadLook;
      return stepOfLeader(s, t);
    case At::kLeadSenders:
      if (!turnForSenders(s, t, At::kLeadSenders)) {
        step_ = "lead: there are tasks, and no sender relies on it";
        t.at = At::kLeadEnd;
      }
      return true;
    case At::kLeadLook:
      step_ = "lead: looks whether to go on";
      if (runnable(s) || s.broken || s.guest || s.guestUntil) {
        t.at = At::kLeadEnd;
      } else if (t.active) {
        t.spinning = 1;
        t.at = At::kLead;
      } else {
        t.spinning = t.spinning && pick(2) == 0;
        t.at = At::kLead;
      }
      t.active = 0;
      return true;
    case At::kLeadEnd:
      if (s.mutex) {
        return false;
      }
      s.leading = 0;
      t.spinning = 0;
      t.active = 0;
      t.queued = 0;
      return nextTask(s, t);
    default:
      return false;
  }
}

// ---- ThreadedEngine::sleep, Doorbell::wait ----

bool EngineModel::stepOfSleeper(State& s, Thread& t) {
  const auto cancel = [&] {
    --s.sleepers;
    s.sleeperUnseen = 0;
    s.rung = 0;
    s.asleep = 0;
    t.at = At::kLeadTurned;
  };
  switch (t.at) {
    case At::kTicket:
      step_ = "sleep: Doorbell::prepare() takes a ticket";
      s.rung = 0;
      t.at = At::kSecondLook;
      return true;
    case At::kSecondLook:
      step_ = "sleep: asleep_, and tries the token for the second look";
      s.asleep = 1;
      if (is(Mutation::kNoSecondLook)) {
        t.at = At::kFutex;
      } else if (s.token) {
        t.active = 1;
        t.at = At::kSleepLooked;
      } else {
        turnOnce(s, t, At::kSleepLooked);
      }
      return true;
    case At::kSleepLooked: {
      const bool queued = s.outbox != 0 && !is(Mutation::kSleepDropsToken);
      if (t.active || t.queued || queued || runnable(s) || s.stopping || s.guest) {
        step_ = "sleep: there is something to do, Doorbell::cancel()";
        cancel();
        t.active = 1;
      } else {
        step_ = "sleep: there is nothing to do";
        t.at = At::kFutex;
      }
      return true;
    }
    case At::kFutex:
      step_ = "Doorbell::wait: FUTEX_WAIT";
      if (is(Mutation::kLateTicket)) {
        s.rung = 0;
      }
      if (s.rung) {
        t.active = 1;
        cancel();
      } else {
        s.sleeperUnseen = 0;
        t.at = At::kInFutex;
      }
      return true;
    case At::kInFutex:
      step_ = "Doorbell::wait: is woken, cancel()";
      if (!t.notified && !(s.peerEnded && !s.endNoticed)) {
        return false;
      }
      t.notified = 0;
      t.active = s.rung;
      cancel();
      return true;
    default:
      return false;
  }
}

} // namespace model
