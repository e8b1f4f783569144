#include "sim_engine.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "allocations.h"
#include "base/error_text.h"
#include "trace.h"

namespace torch_rpc_mpi::simulation {

class SimEngine::Hold {
 public:
  explicit Hold(TokenSource& tokens) : hold_(tokens) {
    held += hold_ ? 1 : 0;
  }
  ~Hold() {
    release();
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  explicit operator bool() const {
    return static_cast<bool>(hold_);
  }
  ProgressToken& operator*() const {
    return *hold_;
  }
  void release() {
    held -= hold_ ? 1 : 0;
    hold_.release();
  }

 private:
  TokenHold hold_;
};

class SimEngine::MemoryFault {
 public:
  explicit MemoryFault(int& after) {
    if (after >= 0) {
      testing::failAllocations(1, std::exchange(after, -1));
    }
  }
  ~MemoryFault() {
    testing::failAllocations(0);
  }
  MemoryFault(const MemoryFault&) = delete;
  MemoryFault& operator=(const MemoryFault&) = delete;
};

SimEngine::SimEngine(int rank, EngineDriver& driver, Random& random, std::function<void()> othersRun)
    : rank_(rank),
      driver_(driver),
      random_(random),
      othersRun_(std::move(othersRun)) {}

SimEngine::~SimEngine() = default;

bool SimEngine::stop(std::chrono::milliseconds) {
  stopping_ = true;
  othersRun_();
  std::exchange(tasks_, {}).clear();
  return running_ == 0;
}

void SimEngine::post(std::vector<TaskPtr>& tasks) {
  if (stopping_) {
    return; // the caller's vector destroys them
  }
  std::ranges::move(tasks, std::back_inserter(tasks_));
  tasks.clear();
  othersRun_();
}

bool SimEngine::turnOnce(std::vector<TaskPtr>& tasks) {
  const Hold hold(tokens_);
  const MemoryFault fault(failsAfter_);
  return hold && driver_.turn(*hold, tasks);
}

void SimEngine::breakDown(const std::string& reason) {
  if (!std::exchange(broken_, true)) {
    trace().note("broken", rank_);
    std::vector<TaskPtr> tasks;
    driver_.onBroken(reason, tasks);
    post(tasks);
  }
}

void SimEngine::submitted(bool) {
  std::vector<TaskPtr> tasks;
  // Else another thread has the token, and looks at the queue in a later turn.
  if (random_.chance(70)) {
    while (driver_.hasQueued()) {
      Hold hold(tokens_);
      if (!hold) {
        break;
      }
      try {
        driver_.turn(*hold, tasks);
      } catch (const std::exception& error) {
        hold.release();
        breakDown(errorText(error));
        break;
      }
    }
  }
  post(tasks);
  othersRun_();
}

bool SimEngine::turn() {
  SimEngine* const before = std::exchange(current, this);
  std::vector<TaskPtr> tasks;
  bool active = false;
  try {
    active = turnOnce(tasks);
    while (!tasks.empty() && driver_.hasQueued()) {
      turnOnce(tasks);
    }
  } catch (const std::exception& error) {
    breakDown(errorText(error));
  }
  active = active || !tasks.empty();
  if (!stopping_) {
    std::ranges::move(tasks, std::back_inserter(tasks_));
  }
  current = before;
  return active;
}

void SimEngine::runTask() {
  SimEngine* const before = std::exchange(current, this);
  const auto chosen = tasks_.begin() + static_cast<ptrdiff_t>(random_.below(tasks_.size()));
  TaskPtr task = std::move(*chosen);
  tasks_.erase(chosen);
  ++running_;
  {
    const MemoryFault fault(failsAfter_);
    task->run();
  }
  task.reset();
  --running_;
  current = before;
}

void SimEngine::driveFor(const void* awaited, const std::function<bool()>& over) {
  announceGuest(false);
  TaskPtr mine;
  for (size_t turns = random_.below(6); turns > 0 && mine == nullptr && !over() && leads(); --turns) {
    std::vector<TaskPtr> tasks;
    try {
      turnOnce(tasks);
    } catch (const std::exception& error) {
      breakDown(errorText(error));
    }
    mine = takeCompletionOf(awaited, tasks);
    post(tasks);
  }
  if (mine != nullptr) {
    mine->run();
  }
}

void SimEngine::withToken(const std::function<void(ProgressToken&)>& body) {
  const Hold hold(tokens_);
  if (!hold) {
    trace().fail("the holder of the progress token waits for it");
  }
  body(*hold);
}

std::optional<size_t> SimEngine::queuedBefore(const std::function<bool(const Task&)>& isIt) const {
  const auto found = std::ranges::find_if(tasks_, [&](const TaskPtr& task) { return isIt(*task); });
  return found == tasks_.end() ? std::nullopt : std::optional<size_t>(found - tasks_.begin());
}

EngineCounts SimEngine::counts() const {
  EngineCounts counts;
  counts.busy = running_;
  counts.queuedRequests = tasks_.size();
  return counts;
}

} // namespace torch_rpc_mpi::simulation
