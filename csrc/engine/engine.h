// What drives the transport and runs what arrives, as its users see it.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/idling.h"
#include "engine/task.h"
#include "host/doorbell.h"
#include "transport/progress_token.h"

namespace torch_rpc_mpi {

// What the leader drives. Called with the token, never concurrently.
class EngineDriver {
 public:
  virtual ~EngineDriver() = default;
  // One bounded turn: post what was queued, poll, fire deadlines. Appends tasks; returns whether anything happened.
  virtual bool turn(ProgressToken& token, std::vector<TaskPtr>& tasks) = 0;
  // Whether something was queued for the token's holder (asked without the token).
  virtual bool hasQueued() const = 0;
  // When the next deadline is due; Clock::time_point::max() for none.
  virtual Clock::time_point nextDeadline() const = 0;
  // Whether somebody waits for something to arrive.
  virtual bool awaitsAnswers() const = 0;
  // Whether nothing can become due unless the doorbell rings or the next deadline comes.
  virtual bool rests() const = 0;
  // Whether something is to be looked at again that no doorbell tells of: a device's work.
  virtual bool awaitsDevice() const {
    return false;
  }
  // A turn threw: the transport is broken. Called once, without the token; progress has stopped. Appends tasks.
  virtual void onBroken(const std::string& reason, std::vector<TaskPtr>& tasks) noexcept = 0;
};

struct EngineOptions {
  int numWorkerThreads = 16;
  int coresToSpare = 1; // tasks of a kind that run at once while they are short
  IdlingOptions idling;
  // Runs `body` on a new engine thread; the place where the bindings attach a Python thread state for the thread's
  // life.
  std::function<void(const std::function<void()>& body)> threadHook = [](const std::function<void()>& body) { body(); };
};

struct EngineCounts {
  int threads = 0;
  int busy = 0;
  int runningRequests = 0;
  int waitingRequests = 0; // of those, for calls that they made, probably
  size_t queuedRequests = 0;
  size_t queuedCompletions = 0;
};

// User code runs only in tasks, never with the token or a lock held. ThreadedEngine is the one; a simulation has
// another, without threads.
class Engine {
 public:
  virtual ~Engine() = default;

  virtual void start() = 0;
  // Stops after the tasks that are running; queued ones are dropped, in the caller, and those that a turn still yields,
  // in the thread that leads. Returns false when some were still running after `limit`; their threads go on, and
  // everything they use must stay.
  virtual bool stop(std::chrono::milliseconds limit) = 0;

  // Any thread. The tasks run soon on an engine thread, or are destroyed when the engine has stopped.
  virtual void post(std::vector<TaskPtr>& tasks) = 0;
  void post(TaskPtr task) {
    std::vector<TaskPtr> tasks;
    tasks.push_back(std::move(task));
    post(tasks);
  }
  // Any thread: something was queued for the driver. Runs a turn here if the token is free, otherwise its holder picks
  // the work up. `expectsReply`: somebody has to poll for the answer from now on.
  virtual void submitted(bool expectsReply) = 0;
  // Any thread that is not the engine's, see Note [Guests]. From announceGuest() on it leads when it waits; what it
  // submits until then wakes nobody. driveFor() returns when the completion of `awaited` has run here or over() holds,
  // or after the spin time, or a few milliseconds in any case, or at once if there is a guest already.
  static void announceGuest(bool coming);
  static bool guestAnnounced();
  virtual void driveFor(const void* awaited, const std::function<bool()>& over) = 0;

  // Takes the token, waiting for its holder to finish its turn. For starting and closing only.
  virtual void withToken(const std::function<void(ProgressToken&)>& body) = 0;
  virtual void wake() = 0;

  virtual EngineCounts counts() const = 0;
  // How many requests are to be taken before the queued one that `isIt` finds; nothing if none is.
  virtual std::optional<size_t> queuedBefore(const std::function<bool(const Task&)>& isIt) const = 0;
  virtual bool onEngineThread() const = 0;
};

// How an agent gets its engine.
using MakeEngine = std::function<std::shared_ptr<Engine>(EngineOptions, EngineDriver&, BellWord&)>;
std::shared_ptr<Engine> makeThreadedEngine(EngineOptions options, EngineDriver& driver, BellWord& bell);

} // namespace torch_rpc_mpi
