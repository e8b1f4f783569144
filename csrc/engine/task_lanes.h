// The tasks of an engine that are queued, and how many run: one lane for each kind.
//
// Note [How many at once]
// ~~~~~~~~~~~~~~~~~~~~~~~
// Short tasks of Python functions run one after the other faster than side by side, where they fight for the GIL. So
// only as many run at once as there are cores to spare, until the standby finds that none has ended for a while
// although others wait: then they are long, and it doubles the number, up to num_worker_threads requests and
// kCompletionThreads completions. A task that makes a call itself will probably wait for it, and does not count while
// it does.
//
// Note [Second attempts]
// ~~~~~~~~~~~~~~~~~~~~~~
// A call that was not run, because the callee lacks a name, comes again (python/repeatable_call.h), and by then
// requests may run that wait for what it makes: local_value() of the RRef that a refused rpc.remote() will create, say.
// With a thread for each request in the order of arrival, as in TensorPipe, what makes a value is always ahead of what
// waits for it. So a second attempt has the place that the first had: it is taken before other requests, and requests
// that are blocked in a wait of ours leave their places to it. When what they wait for is there, they wait for a place,
// before further second attempts: no more than num_worker_threads functions run that are not blocked; with 1, one at a
// time.
//
// Note [Creations]
// ~~~~~~~~~~~~~~~~
// A request with large tensors is passed by later ones, on its way or where it waits for credit or a device, and so
// what waits for a value can be ahead of what makes it, as it cannot in TensorPipe: 16 times local_value() would hold
// all threads until their time is over. So requests that are blocked until such a value is there leave their places to
// those that may make one, rpc.remote's, and to no others: a request of another kind could block likewise, and as many
// threads would be needed as there are requests. Creations that wait for values themselves do need them, up to
// kAllThreads, and so do calls in a context of distributed autograd, whose messages do not tell what is in them.
// TorchScript waits inside of torch: a function of it counts as blocked from its start to its end if it is given an
// RRef without a value, and so a creation may run beside it. Calls under a profiler run in threads of their own, and
// leave no places.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <vector>

#include "engine/task.h"

namespace torch_rpc_mpi {

// Guarded by the engine's mutex, but runnable() is for anyone.
class TaskLanes {
 public:
  TaskLanes(int numWorkerThreads, int coresToSpare);

  void add(std::vector<TaskPtr>& tasks);
  TaskPtr take();                // if runnable(); it runs from then on
  void mayWait(Task::Kind kind); // a running task has made a call
  // A running request is blocked in a wait, until there is a value of this process, or not; it comes back, and from
  // then on wants a place; there is one; it has it.
  void blocks(bool forValue);
  void comesBack(bool forValue);
  bool hasPlace() const;
  void goesOn();
  void ended(Task::Kind kind, bool didWait);
  void look(); // once in a while: finds lanes whose tasks are long
  std::deque<TaskPtr> takeAll();

  bool runnable() const { // a queued task could be taken now
    return runnable_;
  }
  bool mayComplete() const { // take() would give a completion
    return mayRun(Task::Kind::kCompletion);
  }
  bool backlog() const; // something waits only because others of its kind run
  int running() const;
  int running(Task::Kind kind) const {
    return lane(kind).running;
  }
  int waiting(Task::Kind kind) const {
    return lane(kind).waiting;
  }
  // The queued requests before the one that `isIt` finds; nothing if none is.
  std::optional<size_t> requestsBefore(const std::function<bool(const Task&)>& isIt) const;
  size_t queued(Task::Kind kind) const {
    return lane(kind).queued();
  }

 private:
  struct Lane {
    std::deque<TaskPtr> queue;
    std::deque<TaskPtr> creations; // whose places are among those of the queue
    std::deque<TaskPtr> secondAttempts;
    uint64_t places = 0; // given
    int running = 0;
    int waiting = 0;  // of those, for a call, probably
    int blocked = 0;  // of those, in a wait, or back from it without a place
    int back = 0;     // of those
    int forValue = 0; // of the blocked ones that are not back, until there is a value
    int atOnce = 1;
    uint64_t ended = 0;
    uint64_t endedAtLook = 0;
    Clock::time_point stuckSince;

    size_t queued() const {
      return queue.size() + creations.size() + secondAttempts.size();
    }
    std::deque<TaskPtr>& queueOf(Task::Kind kind) {
      return kind == Task::Kind::kCreation ? creations : kind == Task::Kind::kSecondAttempt ? secondAttempts : queue;
    }
    std::deque<TaskPtr>& first() { // of the queue and the creations, the one whose front is before the other's
      return queue.empty() || (!creations.empty() && creations.front()->place < queue.front()->place) ? creations
                                                                                                      : queue;
    }
  };
  Lane& lane(Task::Kind kind) {
    return lanes_[kind == Task::Kind::kCompletion ? 0 : 1];
  }
  const Lane& lane(Task::Kind kind) const {
    return lanes_[kind == Task::Kind::kCompletion ? 0 : 1];
  }
  bool mayRun(Task::Kind kind) const;
  bool mayTakeSecondAttempt() const;
  bool mayTakeCreation() const; // although there is no place for a request
  bool mayTakeAnother(Task::Kind kind) const;
  int limitOf(Task::Kind kind) const;
  void update();

  const int numWorkerThreads_;
  const int coresToSpare_;
  std::array<Lane, 2> lanes_; // of completions and of requests
  std::atomic<bool> runnable_{false};
};

} // namespace torch_rpc_mpi
