// The tasks of an engine that are queued, and how many run: one lane for each kind.
//
// Note [How many at once]
// ~~~~~~~~~~~~~~~~~~~~~~~
// Short tasks of Python functions run one after the other faster than side by side, where they fight for the GIL. So
// only as many run at once as there are cores to spare, until the standby finds that none has ended for a while
// although others wait: then they are long, and it doubles the number, up to num_worker_threads requests and
// kCompletionThreads completions. A task that makes a call itself will probably wait for it, and does not count while
// it does.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
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
  size_t queued(Task::Kind kind) const {
    return lane(kind).queue.size();
  }

 private:
  struct Lane {
    std::deque<TaskPtr> queue;
    int running = 0;
    int waiting = 0; // of those, for a call, probably
    int atOnce = 1;
    uint64_t ended = 0;
    uint64_t endedAtLook = 0;
    Clock::time_point stuckSince;
  };
  Lane& lane(Task::Kind kind) {
    return lanes_[static_cast<size_t>(kind)];
  }
  const Lane& lane(Task::Kind kind) const {
    return lanes_[static_cast<size_t>(kind)];
  }
  bool mayRun(Task::Kind kind) const;
  bool mayTakeAnother(Task::Kind kind) const;
  int limitOf(Task::Kind kind) const;
  void update();

  const int numWorkerThreads_;
  const int coresToSpare_;
  std::array<Lane, 2> lanes_; // by Task::Kind
  std::atomic<bool> runnable_{false};
};

} // namespace torch_rpc_mpi
