// ThreadedEngine's and the agent's functions that any thread may run: turn, post, submitted, send.
#include <utility>

#include "model/engine_model.h"

namespace model {

// ---- ThreadedEngine::turnOnce, turnForSenders; Dispatcher::turn ----

void EngineModel::turnOnce(State& s, Thread& t, At after) {
  t.active = 0;
  t.queued = 0;
  if (s.token) {
    t.at = after;
  } else {
    s.token = 1;
    t.at = At::kTurnPost;
    t.afterTurn = after;
  }
}

bool EngineModel::turnForSenders(State& s, Thread& t, At after) {
  if (s.outbox == 0 || s.token || pick(2) == 1) { // it has made kMostForSenders of them
    return false;
  }
  step_ = "turnForSenders: a turn";
  turnOnce(s, t, after);
  return true;
}

bool EngineModel::stepOfTurn(State& s, Thread& t) {
  switch (t.at) {
    case At::kTurnPost: {
      step_ = "turn: posts what is queued";
      const Set queued = s.outbox;
      s.outbox = 0;
      t.active = queued != 0;
      t.at = At::kTurnPoll;
      const bool gone = s.gone != Gone::kNo && !is(Mutation::kGoneStillSent);
      if (gone || s.closed) { // Exchange::post refuses them, ReleaseTask tells their senders
        const Set failed = queued & s.calls;
        s.calls &= ~failed;
        s.made |= failed;
        s.arrivals |= failed;
        return true;
      }
      if (queued != 0 && s.gone != Gone::kNo) {
        violate("something is sent to a peer that is gone");
      }
      s.atPeer |= queued & kCalls;
      s.answered |= queued & kRequests;
      return true;
    }
    case At::kTurnPoll:
      receive(s, t);
      if (setup_.peer == Peer::kStays && !setup_.breaks) {
        return stepOfTurn(s, t); // others can fail to get the token in between, as they can before
      }
      return true;
    case At::kTurnGone:
      step_ = "onPeerEnded: takes the peer's calls";
      if (!is(Mutation::kGoneCallsForgotten)) {
        const Set failed = s.calls & completionTasks_;
        s.calls &= ~failed;
        s.made |= failed;
        s.arrivals |= failed;
      }
      t.at = At::kTurnEnd;
      return true;
    case At::kTurnEnd:
      t.threw = setup_.breaks && !s.broken && pick(2) == 1;
      step_ = t.threw ? "turn: throws" : "turn: ends";
      if (!t.threw || !is(Mutation::kBrokenArrivalsLost)) {
        t.tasks = std::exchange(s.arrivals, 0);
      }
      if (t.afterTurn == At::kDriveTurned && (t.tasks & t.task)) {
        t.mine = 1;
        t.tasks &= ~t.task;
      }
      if (is(Mutation::kQueuesLate)) {
        s.token = 0;
      }
      t.queued = t.tasks != 0 && !s.stopping;
      t.afterPost = t.queued ? At::kTurnRelease : At::kNowhere;
      t.at = t.queued ? At::kPost : At::kTurnRelease;
      return t.queued || stepOfTurn(s, t);
    case At::kTurnRelease:
      step_ = "turnOnce: the token is released";
      s.token = s.token && is(Mutation::kQueuesLate); // another's then
      drop(s, t.tasks);
      if (t.threw) {
        threw(s, t);
      } else {
        go(t, t.afterTurn);
      }
      return true;
    case At::kBreakDown:
      step_ = "breakDown: broken_";
      if (s.mutex) {
        return false;
      }
      if (s.broken) {
        go(t, t.afterTurn);
      } else {
        s.broken = 1;
        t.at = At::kOnBroken;
      }
      return true;
    case At::kOnBroken:
      step_ = "onBroken: takes the calls that are left";
      s.callsClosed = 1;
      if (s.calls == 0) {
        go(t, t.afterTurn);
        return true;
      }
      s.made |= s.calls;
      t.tasks = std::exchange(s.calls, 0);
      t.at = At::kPost;
      t.afterPost = std::exchange(t.afterTurn, At::kNowhere);
      return true;
    default:
      return false;
  }
}

// Exchange::poll, Dispatcher::onMessage, Losses::look
void EngineModel::receive(State& s, Thread& t) {
  t.at = At::kTurnEnd;
  if (s.closed) {
    step_ = "turn: the exchange is closed";
    return;
  }
  const Set arrived = s.inbox;
  s.inbox = 0;
  const Set answers = arrived & s.calls;
  if (!is(Mutation::kResponseKeepsCall)) {
    s.calls &= ~answers;
  }
  const Set tasks = answers | (arrived & kRequests);
  s.made |= tasks;
  s.arrivals |= tasks;
  t.active |= arrived != 0;
  if (arrived & kGoodbye) {
    step_ = "turn: polls, a goodbye has arrived";
    t.at = onPeerEnded(s, Gone::kLeft) ? At::kTurnGone : At::kTurnEnd;
  } else if (arrived == 0 && s.peerEnded && !s.endNoticed && pick(2) == 1) {
    step_ = "look: the peer's process has ended";
    s.endNoticed = 1;
    t.at = onPeerEnded(s, Gone::kEnded) ? At::kTurnGone : At::kTurnEnd;
  } else {
    step_ = "turn: polls";
  }
}

bool EngineModel::onPeerEnded(State& s, Gone why) {
  if (s.gone != Gone::kNo) {
    if (is(Mutation::kGoneTwice)) {
      violate("the first reason why a peer is gone does not stick");
    }
    return false;
  }
  s.gone = why;
  return true;
}

// What each caller of turn() does when it throws, up to breakDown().
void EngineModel::threw(State& s, Thread& t) {
  t.at = At::kBreakDown;
  t.threw = t.queued = t.active = 0;
  if (t.afterTurn == At::kSleepLooked) {
    --s.sleepers;
    s.asleep = 0;
    t.afterTurn = At::kLeadTurned;
  } else if (t.afterTurn == At::kLeadSenders) {
    t.afterTurn = At::kLeadTurned;
  } else if (t.afterTurn == At::kSubmitted) {
    t.afterTurn = At::kSubmittedReply;
  } else if (t.afterTurn == At::kDriveTurned) {
    t.afterTurn = At::kDriveIdle;
  }
}

void EngineModel::complete(State& s, Set calls) {
  if (s.completed & calls) {
    violate("a call completes twice");
  }
  s.completed |= calls;
}

// Destroys tasks that have not run.
void EngineModel::drop(State& s, Set& tasks) {
  if ((s.ran | s.dropped) & tasks) {
    violate("a task is dropped twice, or after it ran");
  }
  s.dropped |= tasks;
  complete(s, tasks & completionTasks_);
  tasks = 0;
}

// ---- ThreadedEngine::queue, wakeLeader, Doorbell::ring ----

void EngineModel::wakeLeader(Thread& t, At after) {
  t.at = At::kWakeLeader;
  t.afterRing = after;
}

void EngineModel::ring(Thread& t, At after) {
  t.at = At::kRingLook;
  t.afterRing = after;
}

bool EngineModel::stepOfPost(State& s, Thread& t) {
  switch (t.at) {
    case At::kPost:
      step_ = "queue";
      if (s.mutex) {
        return false;
      }
      if (s.stopping && !is(Mutation::kPostAfterStop)) {
        t.queued = 0;
        if (t.afterPost != At::kTurnRelease) {
          drop(s, t.tasks);
        }
        go(t, t.afterPost);
        return true;
      }
      enqueue(s, t.tasks);
      if (!s.leading) {
        wakeIdleThread(s);
      }
      t.at = At::kPostLook;
      return true;
    case At::kPostLook:
      step_ = "queue: looks whether the leader is asleep";
      if (s.asleep && !is(Mutation::kPostSilent)) {
        ring(t, t.afterPost);
        t.afterPost = At::kNowhere;
      } else {
        go(t, t.afterPost);
      }
      return true;
    case At::kWakeLeader:
      step_ = "wakeLeader";
      if (s.mutex) {
        return false;
      }
      if (!s.leading) {
        wakeIdleThread(s);
      }
      ring(t, t.afterRing);
      return true;
    case At::kRingLook:
      step_ = "Doorbell::ring: looks for sleepers";
      if (&t == &s.threads[kThePeer] && !is(Mutation::kRingUnordered)) {
        s.inbox |= s.stored;
        s.stored = 0;
      }
      if (s.sleepers == 0 || s.sleeperUnseen) {
        go(t, t.afterRing);
      } else {
        t.at = At::kRingWake;
      }
      return true;
    case At::kRingWake: // together, because a wake-up that comes late could only help
      step_ = "Doorbell::ring: counts a ring, FUTEX_WAKE";
      s.rung = s.sleepers > 0 && !is(Mutation::kRingUncounted) ? 1 : s.rung;
      for (int i = 0; i < kEngineThreads; ++i) {
        if (s.threads[i].at == At::kInFutex) {
          s.threads[i].notified = 1;
        }
      }
      go(t, t.afterRing);
      return true;
    default:
      return false;
  }
}

// ---- Caller::call and Outbox::submit, ThreadedEngine::submitted ----

void EngineModel::submit(Thread& t, Set message, At after) {
  t.out = message;
  t.at = At::kSubmit;
  t.afterSubmit = after;
}

void EngineModel::call(State& s, Thread& t, Set id, At after) {
  s.calls |= id;
  submit(t, id, after);
  t.expectsReply = 1;
  t.at = At::kSendLook;
}

bool EngineModel::stepOfSubmit(State& s, Thread& t) {
  const auto replyOver = [&] {
    t.expectsReply = 0;
    go(t, t.afterSubmit);
  };
  switch (t.at) {
    case At::kSendLook:
      if (s.gone == Gone::kNo) {
        step_ = "sendToPeer: the peer is there";
        t.at = At::kSubmit;
        return true;
      }
      step_ = "sendToPeer: the peer is gone";
      complete(s, s.calls & t.out);
      s.calls &= ~t.out;
      t.out = 0;
      replyOver();
      return true;
    case At::kSubmit:
      step_ = "submit: queues the message";
      s.outbox |= t.out;
      t.out = 0;
      t.at = At::kSubmitted;
      return true;
    case At::kSubmitted:
      if (turnForSenders(s, t, is(Mutation::kSubmitDropsToken) ? At::kSubmittedReply : At::kSubmitted)) {
        return true;
      }
      t.active = t.queued = 0;
      if (s.outbox != 0 && !s.token && !is(Mutation::kSubmitLeavesQueued)) {
        step_ = "submitted: leaves what is queued to others";
        wakeLeader(t, At::kSubmittedReply);
      } else {
        step_ = "submitted: nothing is queued, or another has the token";
        t.at = At::kSubmittedReply;
      }
      return true;
    case At::kSubmittedReply:
      t.active = t.queued = 0;
      step_ = "submitted: expects a reply, or not";
      if (!t.expectsReply || t.announced) {
        replyOver();
      } else if (s.guestUntil) {
        s.guestUntil = 0;
        t.at = At::kSubmittedWake;
      } else {
        ring(t, At::kTaskMayWait);
      }
      return true;
    case At::kSubmittedWake:
      step_ = "submitted: calls an idle thread, since no guest will come";
      if (s.mutex) {
        return false;
      }
      wakeIdleThread(s);
      ring(t, At::kTaskMayWait);
      return true;
    case At::kTaskMayWait:
      step_ = "taskMayWait";
      if (t.afterSubmit == At::kInnerWait) { // on an engine thread
        if (s.mutex) {
          return false;
        }
        t.waiting = 1;
        if (!s.leading || runnable(s)) {
          wakeIdleThread(s);
        }
      }
      replyOver();
      return true;
    default:
      return false;
  }
}

bool EngineModel::stepOfCaller(State& s, Thread& t) {
  const auto kind = [&] { return setup_.callers[static_cast<size_t>(&t - &s.threads[kEngineThreads])]; };
  switch (t.at) {
    case At::kSend:
      step_ = "send";
      if (s.callsClosed) { // it throws
        t.at = At::kDone;
      } else if (kind() == Caller::kCallsItself) { // Server::ownRequest
        s.calls |= t.task;
        s.made |= t.task;
        t.tasks = t.task;
        t.afterPost = At::kAwait;
        t.at = At::kPost;
      } else {
        t.announced = kind() == Caller::kDrives;
        call(s, t, t.task, t.announced ? At::kDrive : At::kAwait);
      }
      return true;
    case At::kAwait:
      step_ = "has its answer";
      if (!(s.completed & t.task)) {
        return false;
      }
      t = Thread();
      t.at = At::kDone;
      return true;
    default:
      return false;
  }
}

} // namespace model
