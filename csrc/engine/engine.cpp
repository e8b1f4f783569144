#include "engine/engine.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <thread>

#include <pthread.h>
#include <sched.h>

namespace torch_rpc_mpi {

namespace {

constexpr auto kTick = std::chrono::microseconds(200);
// Completions that run at once, without those that wait for calls of their own: a user's callback that waits for
// another call needs a thread more, which completes that.
constexpr int kCompletionThreads = 48;
// Those that wait included: where a program that waits without end is stopped from taking all threads there are.
constexpr int kAllCompletionThreads = 2048;
// How long no task of a kind ends, while others wait, before more of them run at once. Completions are short by nature;
// what holds them up is usually the GIL, which Python's threads pass on every 5 ms.
constexpr auto kStuckRequests = std::chrono::milliseconds(1);
constexpr auto kStuckCompletions = std::chrono::milliseconds(10);
constexpr auto kFirstSleep = std::chrono::microseconds(50);

thread_local const Engine* currentEngine = nullptr;

thread_local bool guestComing = false;

// What this engine thread runs.
thread_local struct {
  Task::Kind kind = Task::Kind::kCompletion;
  bool waiting = false; // it made a call, for which it probably waits
} currentTask;

} // namespace

Engine::Engine(EngineOptions options, EngineDriver& driver, BellWord& bell)
    : options_(std::move(options)),
      driver_(driver),
      doorbell_(bell) {}

bool Engine::onEngineThread() const {
  return currentEngine == this;
}

void Engine::start() {
  const std::lock_guard<std::mutex> lock(mutex_);
  // One leads, one stands by; more come when tasks need them.
  if (!spawn() || !spawn()) {
    throw std::runtime_error("RPC cannot start its threads: this process may have no more");
  }
}

bool Engine::spawn() {
  ++threads_;
  try {
    std::thread([self = shared_from_this()] {
      pthread_setname_np(pthread_self(), "rpc_mpi");
      currentEngine = self.get();
      self->options_.threadHook([&] { self->threadMain(); });
      const std::lock_guard<std::mutex> lock(self->mutex_);
      --self->threads_;
      self->stoppedCv_.notify_all();
    }).detach();
  } catch (const std::system_error&) { // no more threads for this process
    --threads_;
    return false;
  }
  return true;
}

void Engine::threadMain() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (TaskPtr task = nextTask(lock)) {
    Lane& lane = lanes_[static_cast<size_t>(task->kind())];
    lock.unlock();
    currentTask = {task->kind(), false};
    task->run();
    task.reset();
    lock.lock();
    --lane.running;
    lane.waiting -= currentTask.waiting ? 1 : 0;
    ++lane.ended;
    updateRunnable();
  }
}

int Engine::busy() const {
  return lanes_[0].running + lanes_[1].running;
}

bool Engine::mayRun(Task::Kind kind) const {
  const Lane& lane = lanes_[static_cast<size_t>(kind)];
  return !lane.queue.empty() && mayTakeAnother(kind) && lane.running - lane.waiting < lane.atOnce;
}

bool Engine::mayTakeAnother(Task::Kind kind) const {
  const Lane& lane = lanes_[static_cast<size_t>(kind)];
  if (kind == Task::Kind::kRequest) {
    return lane.running < options_.numWorkerThreads;
  }
  return lane.running - lane.waiting < kCompletionThreads && lane.running < kAllCompletionThreads;
}

void Engine::updateRunnable() {
  for (Lane& lane : lanes_) {
    if (lane.queue.empty()) {
      lane.atOnce = options_.coresToSpare;
    }
  }
  runnable_ = mayRun(Task::Kind::kCompletion) || mayRun(Task::Kind::kRequest);
}

void Engine::enqueue(std::vector<TaskPtr>& tasks) {
  for (TaskPtr& task : tasks) {
    lanes_[static_cast<size_t>(task->kind())].queue.push_back(std::move(task));
  }
  tasks.clear();
  updateRunnable();
  if (!ticking_ && backlog()) {
    parkedCv_.notify_one();
  }
}

bool Engine::backlog() const {
  for (const Task::Kind kind : {Task::Kind::kCompletion, Task::Kind::kRequest}) {
    const Lane& lane = lanes_[static_cast<size_t>(kind)];
    if (!lane.queue.empty() && lane.running > 0 && mayTakeAnother(kind)) {
      return true;
    }
  }
  return false;
}

int Engine::limitOf(Task::Kind kind) const {
  return kind == Task::Kind::kRequest ? options_.numWorkerThreads : kCompletionThreads;
}

TaskPtr Engine::nextTask(std::unique_lock<std::mutex>& lock) {
  while (!stopping_) {
    if (TaskPtr task = take()) {
      return task;
    }
    if (!leading_ && !broken_ && !guestLeads()) {
      leading_ = true;
      if (!ticking_ && backlog()) {
        parkedCv_.notify_one();
      }
      lock.unlock();
      lead();
      lock.lock();
      leading_ = false;
    } else {
      standBy(lock);
    }
  }
  return nullptr;
}

TaskPtr Engine::take() {
  const auto kind = mayRun(Task::Kind::kCompletion) ? Task::Kind::kCompletion : Task::Kind::kRequest;
  if (!mayRun(kind)) {
    return nullptr;
  }
  // Beside this one there is to be a leader and a standby; without another thread in the process, one for both.
  if (threads_ - busy() < 3 && !spawn() && threads_ - busy() < 2) {
    return nullptr;
  }
  Lane& lane = lanes_[static_cast<size_t>(kind)];
  TaskPtr task = std::move(lane.queue.front());
  lane.queue.pop_front();
  ++lane.running;
  updateRunnable();
  // Somebody must look after leadership and the rest of the queue while this runs.
  if (!ticking_) {
    parkedCv_.notify_one();
  }
  return task;
}

void Engine::standBy(std::unique_lock<std::mutex>& lock) {
  // Ticking is for the time when traffic flows (asleep_ says that it does not) or when tasks wait for others to end.
  if (!ticking_ && !broken_ && (!asleep_ || backlog())) {
    ticking_ = true;
    const bool timedOut = standbyCv_.wait_for(lock, kTick) == std::cv_status::timeout;
    ticking_ = false;
    if (timedOut) {
      tick();
    }
    return;
  }
  ++parked_;
  parkedCv_.wait(lock);
  --parked_;
}

void Engine::tick() {
  const auto now = Clock::now();
  for (const Task::Kind kind : {Task::Kind::kCompletion, Task::Kind::kRequest}) {
    Lane& lane = lanes_[static_cast<size_t>(kind)];
    if (lane.queue.empty() || lane.ended != lane.endedAtLook) {
      lane.endedAtLook = lane.ended;
      lane.stuckSince = now;
    } else if (now - lane.stuckSince >= (kind == Task::Kind::kRequest ? kStuckRequests : kStuckCompletions)) {
      lane.atOnce = std::min(lane.atOnce * 2, limitOf(kind));
      lane.stuckSince = now;
    }
  }
  updateRunnable();
}

void Engine::taskMayWait() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!currentTask.waiting) {
    currentTask.waiting = true;
    ++lanes_[static_cast<size_t>(currentTask.kind)].waiting;
    updateRunnable();
  }
  if (!leading_ || runnable_) {
    wakeIdleThread();
  }
}

void Engine::lead() {
  std::vector<TaskPtr> tasks;
  auto lastActivity = Clock::now();
  std::chrono::nanoseconds nextSleep = kFirstSleep;
  while (!stopping_) {
    bool active = false;
    try {
      active = turnOnce(tasks);
      // A sender that found the token taken relies on its holder; this one is about to leave.
      while (!tasks.empty() && driver_.hasQueued()) {
        turnOnce(tasks);
      }
    } catch (const std::exception& error) {
      breakDown(error.what());
    }
    if (!tasks.empty()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      enqueue(tasks);
      return;
    }
    if (runnable_ || broken_ || guestLeads()) {
      return;
    }
    const auto now = Clock::now();
    if (active) {
      lastActivity = now;
      nextSleep = kFirstSleep;
    } else if (now - lastActivity < options_.spinTime) {
      // More ranks than cores must work: whoever has something to do goes first.
      sched_yield();
    } else if (sleep(nextSleep)) {
      lastActivity = Clock::now();
      nextSleep = kFirstSleep;
    } else {
      nextSleep = std::min<std::chrono::nanoseconds>(nextSleep * 2, options_.maxSleep);
    }
  }
}

bool Engine::turnOnce(std::vector<TaskPtr>& tasks) {
  TokenHold hold(tokens_);
  return hold && driver_.turn(*hold, tasks);
}

bool Engine::sleep(std::chrono::nanoseconds limit) {
  const auto deadline = driver_.nextDeadline();
  if (deadline != Clock::time_point::max()) {
    limit = std::min<std::chrono::nanoseconds>(limit, deadline - Clock::now());
  }
  const uint32_t ticket = doorbell_.prepare();
  asleep_ = true;
  bool rung = true;
  if (driver_.hasQueued() || runnable_ || stopping_ || guest_ || limit.count() <= 0) {
    doorbell_.cancel();
  } else {
    rung = doorbell_.wait(ticket, limit);
  }
  asleep_ = false;
  return rung;
}

void Engine::breakDown(const std::string& reason) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (broken_.exchange(true)) {
      return;
    }
  }
  driver_.onBroken(reason);
}

void Engine::post(TaskPtr task) {
  std::vector<TaskPtr> tasks;
  tasks.push_back(std::move(task));
  post(tasks);
}

void Engine::post(std::vector<TaskPtr>& tasks) {
  if (tasks.empty()) {
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) {
      return; // the caller's vector destroys them, outside the lock
    }
    enqueue(tasks);
    if (!leading_) {
      wakeIdleThread();
    }
  }
  doorbell_.ring();
}

void Engine::wakeIdleThread() {
  if (ticking_) {
    standbyCv_.notify_one();
  } else {
    parkedCv_.notify_one();
  }
}

void Engine::submitted(bool expectsReply) {
  std::vector<TaskPtr> tasks;
  while (driver_.hasQueued()) {
    TokenHold hold(tokens_);
    if (!hold) {
      break; // its holder looks at the queue again after releasing
    }
    try {
      driver_.turn(*hold, tasks);
    } catch (const std::exception& error) {
      hold.release();
      breakDown(error.what());
      break;
    }
  }
  post(tasks);
  if (expectsReply && !guestComing) {
    if (guestUntil_.exchange(0) != 0) { // nobody waits for this answer as the last guest did
      const std::lock_guard<std::mutex> lock(mutex_);
      wakeIdleThread();
    }
    doorbell_.ring();
    if (onEngineThread()) {
      taskMayWait();
    }
  }
}

void Engine::announceGuest(bool coming) {
  guestComing = coming;
}

bool Engine::guestAnnounced() {
  return guestComing;
}

bool Engine::guestLeads() const {
  return guest_ || Clock::now().time_since_epoch().count() < guestUntil_;
}

void Engine::driveFor(const void* awaited, const std::function<bool()>& over) {
  guestComing = false;
  TaskPtr mine;
  if (!guest_.exchange(true)) {
    const auto begin = Clock::now();
    while (mine == nullptr && !over() && !stopping_ && !broken_) {
      if (!turnAsGuest(awaited, mine)) {
        if (Clock::now() - begin > options_.spinTime) {
          break;
        }
        sched_yield();
      }
    }
    const bool neededOn = (mine == nullptr && !over()) || driver_.awaitsAnswers();
    guestUntil_ = neededOn ? 0 : (Clock::now() + kTick).time_since_epoch().count();
    guest_ = false;
    if (neededOn || asleep_) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wakeIdleThread();
      doorbell_.ring();
    }
  } else {
    doorbell_.ring();
  }
  if (mine != nullptr) {
    mine->run();
  }
}

bool Engine::turnAsGuest(const void* awaited, TaskPtr& mine) {
  std::vector<TaskPtr> tasks;
  bool active = false;
  try {
    active = turnOnce(tasks);
    while (!tasks.empty() && driver_.hasQueued() && turnOnce(tasks)) {
    }
  } catch (const std::exception& error) {
    breakDown(error.what());
  }
  const auto found =
      std::find_if(tasks.begin(), tasks.end(), [&](const TaskPtr& task) { return task->completes(awaited); });
  if (found != tasks.end()) {
    mine = std::move(*found);
    tasks.erase(found);
  }
  post(tasks);
  return active;
}

void Engine::withToken(const std::function<void(ProgressToken&)>& body) {
  for (;;) {
    TokenHold hold(tokens_);
    if (hold) {
      body(*hold);
      return;
    }
    std::this_thread::yield();
  }
}

bool Engine::stop(std::chrono::milliseconds limit) {
  std::deque<TaskPtr> dropped;
  std::unique_lock<std::mutex> lock(mutex_);
  stopping_ = true;
  for (Lane& lane : lanes_) {
    std::move(lane.queue.begin(), lane.queue.end(), std::back_inserter(dropped));
    lane.queue.clear();
  }
  runnable_ = false;
  parkedCv_.notify_all();
  standbyCv_.notify_all();
  doorbell_.ring();
  // A task may stop its own engine (a user's function that calls rpc.shutdown): it does not wait for itself.
  const int self = onEngineThread() ? 1 : 0;
  const bool stopped = stoppedCv_.wait_for(lock, limit, [&] { return threads_ <= self; });
  lock.unlock();
  return stopped && self == 0;
}

EngineCounts Engine::counts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Lane& requests = lanes_[static_cast<size_t>(Task::Kind::kRequest)];
  const Lane& completions = lanes_[static_cast<size_t>(Task::Kind::kCompletion)];
  return {threads_, busy(), requests.running, requests.queue.size(), completions.queue.size()};
}

} // namespace torch_rpc_mpi
