// The part of ThreadedEngine that the leader runs, see Note [Leader and followers].
#include <algorithm>
#include <exception>
#include <new>
#include <thread>

#include <sched.h>

#include "base/error_text.h"
#include "engine/threaded_engine.h"

namespace torch_rpc_mpi {

namespace {

// Turns that a thread makes for others before it does what it came for.
constexpr int kMostForSenders = 64;

} // namespace

void ThreadedEngine::lead() {
  Idling::Step step;
  idling_.begin(Clock::now());
  while (!stopping_) {
    Turn turn;
    try {
      turn = step.sleep.count() == 0 ? turnOnce() : sleep(step.sleep);
      if (turn.queued) {
        (void)turnForSenders(); // if it does not come to an end, the standby goes on
        return;
      }
    } catch (const std::exception& error) {
      breakDown(errorText(error));
    }
    if (lanes_.runnable() || broken_ || guestLeads()) {
      return;
    }
    step = idling_.next(turn.active, driver_.rests(), Clock::now());
    if (driver_.awaitsDevice()) {
      step.sleep = std::min<std::chrono::nanoseconds>(step.sleep, IdlingTimes::kFirstSleep);
    }
    if (step.pause == Idling::Pause::kYield) {
      sched_yield();
    } else if (step.pause == Idling::Pause::kNap) {
      ThreadAttributes::waits();
      std::this_thread::sleep_for(IdlingTimes::kNap);
      idling_.napped(Clock::now());
    }
  }
}

ThreadedEngine::Turn ThreadedEngine::turnOnce(const void* awaited, TaskPtr* mine) {
  std::vector<TaskPtr> tasks; // those that are dropped are destroyed without the token
  TokenHold hold(tokens_);
  Turn turn;
  turn.hadToken = static_cast<bool>(hold);
  if (!turn.hadToken) {
    return turn;
  }
  std::exception_ptr error;
  try {
    turn.active = driver_.turn(*hold, tasks);
  } catch (...) { // what has arrived before is queued even so
    error = std::current_exception();
  }
  if (mine != nullptr) {
    *mine = takeCompletionOf(awaited, tasks);
  }
  turn.queued = queue(tasks); // with the token: Note [The order of arrival]
  hold.release();
  if (error) {
    std::rethrow_exception(error);
  }
  return turn;
}

bool ThreadedEngine::turnForSenders() {
  for (int turns = 0; driver_.hasQueued(); ++turns) {
    if (turns == kMostForSenders) {
      return false;
    }
    if (!turnOnce().hadToken) { // then another is the one that they rely on
      break;
    }
  }
  return true;
}

ThreadedEngine::Turn ThreadedEngine::sleep(std::chrono::nanoseconds limit) {
  const uint32_t ticket = doorbell_.prepare();
  asleep_ = true;
  Turn turn;
  try {
    // What was sent before the sender could know that this one sleeps. If another thread has the token, it may have
    // looked too early.
    turn = turnOnce();
  } catch (...) {
    doorbell_.cancel();
    asleep_ = false;
    throw;
  }
  const auto deadline = driver_.nextDeadline();
  if (deadline != Clock::time_point::max()) {
    limit = std::min<std::chrono::nanoseconds>(limit, deadline - Clock::now());
  }
  if (!turn.hadToken || turn.active || turn.queued || driver_.hasQueued() || lanes_.runnable() || stopping_ || guest_ ||
      limit.count() <= 0) {
    doorbell_.cancel();
    turn.active = true;
  } else {
    ThreadAttributes::waits();
    turn.active = doorbell_.wait(ticket, limit);
  }
  asleep_ = false;
  return turn;
}

void ThreadedEngine::breakDown(const std::string& reason) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (broken_.exchange(true)) {
      return;
    }
  }
  std::vector<TaskPtr> tasks;
  driver_.onBroken(reason, tasks);
  try {
    post(tasks);
  } catch (const std::bad_alloc&) { // they are dropped, and so fail what they would have failed
  }
}

} // namespace torch_rpc_mpi
