// The threads of the agent: one of them always drives the transport, the others run what arrived.
//
// Note [Leader and followers]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~
// The leader polls. When a turn yields tasks it gives up leadership and runs them itself, so that a request runs on the
// thread that received it, without a hand-over. Nobody is woken for that on the hot path: one idle thread, the standby,
// looks every kTick whether there are tasks for it, and whether nobody leads and, where cores are scarce, nobody has
// begun to since its last look, and steps in. A short request therefore costs no context switch, and a long one delays
// progress by at most two ticks. While the
// process is idle the standby does not tick; the leader wakes it when it leaves sleep to run a task.
//
// A thread takes a task only if two others remain that run none, starting new ones if it must; a process that may have
// no more threads does with one, and for a completion with none. So progress, deadlines and flow control never depend
// on how long user code takes. Requests are bounded by num_worker_threads; completions of futures are not counted with
// them, because a request may be waiting for just that completion. How many
// of them run: Note [How many at once] in task_lanes.h.
//
// Note [Guests]
// ~~~~~~~~~~~~~
// A user's thread that waits for the answer to a call drives progress itself meanwhile, as a guest: the answer then
// needs no other thread to be woken. Of what arrives it runs only the completion it waits for; the rest goes to the
// engine's threads. There is one guest at a time. While there is one, and for a tick after it has left if nobody else
// waits for an answer, since it will probably call again, the engine's threads do not lead but stand by.
//
// Note [The order of arrival]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Requests are queued in the order in which they have arrived: what makes a value is then ahead of what waits for it,
// but for large requests; see Note [Second attempts] and Note [Creations] in task_lanes.h. Two threads may make turns
// one after the other, a leader and a guest, say; so each queues what its turn has yielded before it lets the token go.
// That is why mutex_ may be taken with the token, and the token is never asked for with mutex_.
//
// Note [Sharing cores]
// ~~~~~~~~~~~~~~~~~~~~
// More ranks than cores must work, and so must more busy threads than cores. sched_yield() does not see to that: the
// kernel may go on with the thread that yields, and a leader that a peer's message wakes may take the core from the
// very thread that was about to send more, spin there until it sleeps again, be woken by the next message, and so on,
// with one message in each spin time. Three things prevent it.
// - Engine threads have the policy SCHED_BATCH while they wait: they take an idle core when they are woken, but none
//   from a thread that runs. Not while they run a request or a callback of Python's: SCHED_RESET_ON_FORK
//   notwithstanding, the kernel passes it on to what a user's function starts, however that is done. Most requests are
//   run by a thread that has not waited since its last one, at no cost. The other completions keep the policy: to
//   change it for each of them made remote() with to_here() 8 us slower.
// - Where cores are scarce, a leader that sees other threads of its process get much done, calls being made or tasks
//   being run, sleeps for a moment between its looks, and finds more at each. Nobody rings for it meanwhile.
// - A leader that was away from its core spins for a shorter time (Idling).
//
// User code runs only in tasks, never with the token or a lock held.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/idling.h"
#include "engine/task.h"
#include "engine/task_lanes.h"
#include "engine/thread_attributes.h"
#include "host/doorbell.h"
#include "transport/progress_token.h"

namespace torch_rpc_mpi {

// Held by shared_ptr: its threads keep it alive. Members:
//   mutex_ guards lanes_, threads_, parked_, ticking_, called_, leads_;
//   leading_, stopping_, broken_ are written under mutex_ and read by anyone; workDone_ counts for anyone; asleep_ and
//   idling_ are the leader's; guest_ is set and, with guestUntil_, cleared by the guest; tokens_ is the progress
//   token; options_, driver_ and doorbell_ are immutable after construction, attributes_ after start().
class ThreadedEngine final : public Engine, public std::enable_shared_from_this<ThreadedEngine> {
 public:
  ThreadedEngine(EngineOptions options, EngineDriver& driver, BellWord& bell);

  void start() override;
  bool stop(std::chrono::milliseconds limit) override;
  using Engine::post;
  void post(std::vector<TaskPtr>& tasks) override;
  void submitted(bool expectsReply) override;
  void driveFor(const void* awaited, const std::function<bool()>& over) override; // engine/guests.cpp
  void withToken(const std::function<void(ProgressToken&)>& body) override;
  void wake() override {
    doorbell_.ring();
  }
  EngineCounts counts() const override;
  std::optional<size_t> queuedBefore(const std::function<bool(const Task&)>& isIt) const override;
  bool onEngineThread() const override;

  // While one lives, the request that this thread runs, if it runs one, waits for something, and then for its place:
  // Note [Second attempts], Note [Creations].
  class Blocked {
   public:
    // What it waits for. The last: it may be waiting, inside of torch, or may not, and wants no place at the end.
    enum class For { kAnything, kValueOfThisProcess, kValuePerhaps };
    explicit Blocked(For what = For::kAnything);
    ~Blocked();
    Blocked(const Blocked&) = delete;
    Blocked& operator=(const Blocked&) = delete;

   private:
    ThreadedEngine* const engine_; // null: of no request of an engine, or of one that is blocked already
    const For for_;
  };

 private:
  bool spawn(); // with mutex_ held; false if there are no more threads
  void threadMain();
  TaskPtr nextTask(std::unique_lock<std::mutex>& lock);
  TaskPtr take();                                   // with mutex_ held
  bool standBy(std::unique_lock<std::mutex>& lock); // whether to lead if nobody does
  bool queue(std::vector<TaskPtr>& tasks);          // whether it did
  void wakeIdleThread();                            // with mutex_ held
  void wakeLeader();                                // whoever is to be it
  void taskMayWait();                               // with mutex_ held
  // engine/leader.cpp
  struct Turn {
    bool hadToken = false; // else another thread has it
    bool active = false;   // something happened
    bool queued = false;   // there are tasks for the engine's threads
  };
  void lead();
  // The completion that `awaited` waits for is not queued, but given to `mine`.
  Turn turnOnce(const void* awaited = nullptr, TaskPtr* mine = nullptr);
  // More turns while there are senders that found the token taken, and so rely on its holder, which is about to do
  // something else. Whether this came to an end; else somebody else must look.
  bool turnForSenders();
  Turn sleep(std::chrono::nanoseconds limit); // active: there is something to do
  // engine/guests.cpp
  bool turnAsGuest(const void* awaited, TaskPtr& mine); // whether anything happened
  bool guestLeads() const;
  void breakDown(const std::string& reason);

  const EngineOptions options_;
  EngineDriver& driver_;
  Doorbell doorbell_;
  TokenSource tokens_;
  std::optional<ThreadAttributes> attributes_; // of the thread that called start(), for ours

  mutable std::mutex mutex_;
  std::condition_variable parkedCv_;  // idle threads without a duty
  std::condition_variable standbyCv_; // the ticking one
  std::condition_variable stoppedCv_;
  std::condition_variable places_; // of requests that come back from a wait
  TaskLanes lanes_;
  Idling idling_; // the leader's
  int threads_ = 0;
  int parked_ = 0;
  bool ticking_ = false;
  bool called_ = false;               // the ticking one, since it began to wait
  uint64_t leads_ = 0;                // how often somebody began to lead
  std::atomic<uint64_t> workDone_{0}; // tasks run, messages submitted
  std::atomic<bool> stopping_{false};
  std::atomic<bool> broken_{false};
  std::atomic<bool> leading_{false};
  std::atomic<bool> asleep_{false};
  std::atomic<bool> guest_{false};
  std::atomic<Clock::rep> guestUntil_{0};
};

} // namespace torch_rpc_mpi
