// The part of ThreadedEngine that the leader runs, see Note [Leader and followers].
#include <algorithm>
#include <exception>
#include <iterator>
#include <new>
#include <thread>
#include <utility>

#include <sched.h>

#include "base/error_text.h"
#include "engine/threaded_engine.h"

namespace torch_rpc_mpi {

void ThreadedEngine::lead() {
  std::vector<TaskPtr> tasks;
  Idling::Step step;
  idling_.begin(Clock::now());
  while (!stopping_) {
    bool active = false;
    try {
      active = step.sleep.count() == 0 ? turnOnce(tasks) == Turn::kActive : sleep(step.sleep, tasks);
      // A sender that found the token taken relies on its holder; this one is about to leave.
      while (!tasks.empty() && driver_.hasQueued()) {
        turnOnce(tasks);
      }
    } catch (const std::exception& error) {
      breakDown(errorText(error));
    }
    if (!tasks.empty()) {
      handOver(tasks);
      return;
    }
    if (lanes_.runnable() || broken_ || guestLeads()) {
      return;
    }
    step = idling_.next(active, driver_.rests(), Clock::now());
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

void ThreadedEngine::handOver(std::vector<TaskPtr>& tasks) {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!stopping_) { // else nobody would run them, or drop them; they are destroyed by the caller, outside the lock
      enqueue(tasks);
    }
  } catch (const std::exception& error) { // no memory; those that are left are dropped likewise
    breakDown(errorText(error));
  }
}

ThreadedEngine::Turn ThreadedEngine::turnOnce(std::vector<TaskPtr>& tasks) {
  if (tasks.empty()) {
    TokenHold hold(tokens_);
    if (!hold) {
      return Turn::kNoToken;
    }
    return driver_.turn(*hold, tasks) ? Turn::kActive : Turn::kIdle;
  }
  // What is appended to an empty vector needs no memory, and so is not lost with a turn that throws for want of it.
  std::vector<TaskPtr> more;
  const auto append = [&] { std::move(more.begin(), more.end(), std::back_inserter(tasks)); };
  Turn turn = Turn::kIdle;
  try {
    turn = turnOnce(more);
  } catch (...) {
    append();
    throw;
  }
  append();
  return turn;
}

bool ThreadedEngine::sleep(std::chrono::nanoseconds limit, std::vector<TaskPtr>& tasks) {
  const uint32_t ticket = doorbell_.prepare();
  asleep_ = true;
  bool active = true;
  try {
    // What was sent before the sender could know that this one sleeps. If another thread has the token, it may have
    // looked too early.
    TokenHold hold(tokens_);
    active = !hold || driver_.turn(*hold, tasks) || !tasks.empty();
  } catch (...) {
    doorbell_.cancel();
    asleep_ = false;
    throw;
  }
  const auto deadline = driver_.nextDeadline();
  if (deadline != Clock::time_point::max()) {
    limit = std::min<std::chrono::nanoseconds>(limit, deadline - Clock::now());
  }
  if (active || driver_.hasQueued() || lanes_.runnable() || stopping_ || guest_ || limit.count() <= 0) {
    doorbell_.cancel();
    active = true;
  } else {
    ThreadAttributes::waits();
    active = doorbell_.wait(ticket, limit);
  }
  asleep_ = false;
  return active;
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
