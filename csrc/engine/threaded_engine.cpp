#include "engine/threaded_engine.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include <pthread.h>

#include "base/error_text.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace {

thread_local ThreadedEngine* currentEngine = nullptr;

// What this engine thread runs.
thread_local struct {
  Task::Kind kind = Task::Kind::kCompletion;
  bool waiting = false; // it made a call, for which it probably waits
  bool running = false;
  bool blocked = false;
} currentTask;

} // namespace

ThreadedEngine::ThreadedEngine(EngineOptions options, EngineDriver& driver, BellWord& bell)
    : options_(std::move(options)),
      driver_(driver),
      doorbell_(bell),
      lanes_(options_.numWorkerThreads, options_.coresToSpare),
      idling_(options_.idling, workDone_) {}

bool ThreadedEngine::onEngineThread() const {
  return currentEngine == this;
}

void ThreadedEngine::start() {
  std::unique_lock<std::mutex> lock(mutex_);
  attributes_.emplace();
  // One leads, one stands by; more come when tasks need them.
  if (!spawn() || !spawn()) {
    lock.unlock();
    (void)stop(std::chrono::seconds(1)); // the one that has started
    throw std::runtime_error(noThreadText("the engine of RPC"));
  }
}

bool ThreadedEngine::spawn() {
  ++threads_;
  try {
    std::thread([self = shared_from_this()] {
      pthread_setname_np(pthread_self(), "rpc_mpi");
      self->attributes_->adopt();
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

void ThreadedEngine::threadMain() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (TaskPtr task = nextTask(lock)) {
    currentTask = {task->kind(), /*waiting=*/false, /*running=*/true, /*blocked=*/false};
    lock.unlock();
    if (currentTask.kind != Task::Kind::kCompletion) { // which is short, and says so itself if a user's code is in it
      ThreadAttributes::runs();
    }
    task->run();
    task.reset();
    currentTask.running = false;
    lock.lock();
    lanes_.ended(currentTask.kind, currentTask.waiting);
    places_.notify_all();
    ++workDone_;
  }
}

TaskPtr ThreadedEngine::nextTask(std::unique_lock<std::mutex>& lock) {
  bool mayLead = true;
  while (!stopping_) {
    if (TaskPtr task = take()) {
      return task;
    }
    if (mayLead && !leading_ && !broken_ && !guestLeads()) {
      leading_ = true;
      ++leads_;
      if (!ticking_ && lanes_.backlog()) {
        parkedCv_.notify_one();
      }
      lock.unlock();
      lead();
      lock.lock();
      leading_ = false;
    } else {
      mayLead = standBy(lock);
    }
  }
  return nullptr;
}

TaskPtr ThreadedEngine::take() {
  if (!lanes_.runnable()) {
    return nullptr;
  }
  // Beside this one there is to be a leader and a standby; without another thread in the process, one for both. Without
  // any, this one does what is short, for which those that run may be waiting.
  if (threads_ - lanes_.running() < 3 && !spawn() && threads_ - lanes_.running() < 2 && !lanes_.mayComplete()) {
    return nullptr;
  }
  TaskPtr task = lanes_.take();
  // Somebody must look after leadership and the rest of the queue while this runs.
  if (!ticking_) {
    parkedCv_.notify_one();
  }
  return task;
}

bool ThreadedEngine::standBy(std::unique_lock<std::mutex>& lock) {
  ThreadAttributes::waits();
  // Ticking is for the time when traffic flows (asleep_ says that it does not) or when tasks wait for others to end.
  if (!ticking_ && !broken_ && (!asleep_ || lanes_.backlog())) {
    ticking_ = true;
    called_ = false;
    const uint64_t leads = leads_;
    const bool timedOut = standbyCv_.wait_for(lock, IdlingTimes::kTick) == std::cv_status::timeout;
    ticking_ = false;
    if (timedOut) {
      lanes_.look();
    }
    return called_ || leads == leads_ || !options_.idling.scarce;
  }
  ++parked_;
  parkedCv_.wait(lock);
  --parked_;
  return true;
}

void ThreadedEngine::taskMayWait() {
  const bool known = std::exchange(currentTask.waiting, true);
  if (!known) {
    lanes_.mayWait(currentTask.kind);
  }
  if ((!leading_ && !known) || lanes_.runnable()) {
    wakeIdleThread();
  }
}

ThreadedEngine::Blocked::Blocked(For what)
    : engine_(
          currentTask.running && !currentTask.blocked && currentTask.kind != Task::Kind::kCompletion ? currentEngine
                                                                                                     : nullptr),
      for_(what) {
  if (engine_ != nullptr) {
    currentTask.blocked = true;
    const std::lock_guard<std::mutex> lock(engine_->mutex_);
    engine_->lanes_.blocks(for_ != For::kAnything);
    engine_->taskMayWait();
    engine_->places_.notify_all();
  }
}

ThreadedEngine::Blocked::~Blocked() {
  if (engine_ != nullptr) {
    std::unique_lock<std::mutex> lock(engine_->mutex_);
    engine_->lanes_.comesBack(for_ != For::kAnything);
    if (for_ != For::kValuePerhaps) {
      engine_->places_.wait(lock, [this] { return engine_->lanes_.hasPlace() || engine_->stopping_; });
    }
    engine_->lanes_.goesOn();
    currentTask.blocked = false;
  }
}

void ThreadedEngine::post(std::vector<TaskPtr>& tasks) {
  (void)queue(tasks);
}

bool ThreadedEngine::queue(std::vector<TaskPtr>& tasks) {
  if (tasks.empty()) {
    return false;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) {
      return false; // the caller's vector destroys them, outside the lock
    }
    lanes_.add(tasks);
    if (!ticking_ && lanes_.backlog()) {
      parkedCv_.notify_one();
    }
    if (!leading_) {
      wakeIdleThread();
    }
  }
  // A leader that says later that it sleeps looks for tasks after that.
  if (asleep_) {
    doorbell_.ring();
  }
  return true;
}

void ThreadedEngine::wakeIdleThread() {
  if (ticking_) {
    called_ = true; // a wait that has timed out meanwhile would not tell
    standbyCv_.notify_one();
  } else {
    parkedCv_.notify_one();
  }
}

void ThreadedEngine::wakeLeader() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!leading_) {
      wakeIdleThread();
    }
  }
  doorbell_.ring();
}

void ThreadedEngine::submitted(bool expectsReply) {
  // If the token is taken, its holder looks at the queue again after releasing it.
  try {
    if (!turnForSenders()) {
      wakeLeader();
    }
  } catch (const std::exception& error) {
    breakDown(errorText(error));
  }
  ++workDone_;
  if ((expectsReply || driver_.awaitsDevice()) && !guestAnnounced()) {
    if (guestUntil_.exchange(0) != 0) { // nobody waits for this answer as the last guest did
      const std::lock_guard<std::mutex> lock(mutex_);
      wakeIdleThread();
    }
    doorbell_.ring();
    if (expectsReply && onEngineThread()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      taskMayWait();
    }
  }
}

void ThreadedEngine::withToken(const std::function<void(ProgressToken&)>& body) {
  for (;;) {
    TokenHold hold(tokens_);
    if (hold) {
      body(*hold);
      return;
    }
    std::this_thread::yield();
  }
}

bool ThreadedEngine::stop(std::chrono::milliseconds limit) {
  std::deque<TaskPtr> dropped; // destroyed without the lock
  std::unique_lock<std::mutex> lock(mutex_);
  stopping_ = true;
  dropped = lanes_.takeAll();
  parkedCv_.notify_all();
  standbyCv_.notify_all();
  places_.notify_all();
  doorbell_.ring();
  // A task may stop its own engine (a user's function that calls rpc.shutdown): it does not wait for itself.
  const int self = onEngineThread() ? 1 : 0;
  const bool stopped = stoppedCv_.wait_for(lock, limit, [&] { return threads_ <= self; });
  lock.unlock();
  return stopped && self == 0;
}

EngineCounts ThreadedEngine::counts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {
      threads_,
      lanes_.running(),
      lanes_.running(Task::Kind::kRequest),
      lanes_.waiting(Task::Kind::kRequest),
      lanes_.queued(Task::Kind::kRequest),
      lanes_.queued(Task::Kind::kCompletion)};
}

std::optional<size_t> ThreadedEngine::queuedBefore(const std::function<bool(const Task&)>& isIt) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lanes_.requestsBefore(isIt);
}

std::shared_ptr<Engine> makeThreadedEngine(EngineOptions options, EngineDriver& driver, BellWord& bell) {
  return std::make_shared<ThreadedEngine>(std::move(options), driver, bell);
}

} // namespace torch_rpc_mpi
