// TaskLanes.
#include "model/engine_model.h"

namespace model {

namespace {

constexpr int kWorkers = 2; // num_worker_threads; of completions as many may run at once

} // namespace

int EngineModel::threads(const State& s) {
  int count = 0;
  for (int i = 0; i < kEngineThreads; ++i) {
    count += s.threads[i].at != At::kNowhere && s.threads[i].at != At::kDone;
  }
  return count;
}

int EngineModel::running(const State& s, Set kind) const {
  int count = 0;
  for (int i = 0; i < kEngineThreads; ++i) {
    count += (s.threads[i].task & kind) != 0;
  }
  return count;
}

bool EngineModel::mayTakeAnother(const State& s, Set kind) const {
  return kind == completionTasks_ || running(s, kind) < kWorkers;
}

bool EngineModel::mayRun(const State& s, Set kind) const {
  int counted = 0;
  for (int i = 0; i < kEngineThreads; ++i) {
    counted += (s.threads[i].task & kind) != 0 && !s.threads[i].waiting;
  }
  const Set queue = kind == requestTasks_ ? s.requests : s.completions;
  const int atOnce = kind == requestTasks_ ? s.requestsAtOnce : s.completionsAtOnce;
  return queue != 0 && mayTakeAnother(s, kind) && counted < atOnce;
}

bool EngineModel::runnable(const State& s) const {
  return mayRun(s, completionTasks_) || mayRun(s, requestTasks_);
}

bool EngineModel::backlog(const State& s) const {
  return (s.completions != 0 && running(s, completionTasks_) > 0) ||
      (s.requests != 0 && running(s, requestTasks_) > 0 && mayTakeAnother(s, requestTasks_));
}

// ThreadedEngine::queue
void EngineModel::enqueue(State& s, Set& tasks) {
  Set known = s.requests | s.ran | s.dropped | tasks;
  for (const Thread& t : s.threads) {
    known |= t.task;
  }
  for (Set request = kSecondRequest; request & kRequests; request <<= 1) {
    if ((tasks & request) && !(known & (request >> 1))) {
      violate("requests are queued in another order than they have arrived in");
    }
  }
  s.requests |= tasks & requestTasks_;
  s.completions |= tasks & completionTasks_;
  tasks = 0;
  update(s);
  if (!ticking(s) && backlog(s)) {
    notifyParked(s);
  }
}

void EngineModel::update(State& s) {
  if (s.requests == 0) {
    s.requestsAtOnce = 1;
  }
  if (s.completions == 0) {
    s.completionsAtOnce = 1;
  }
}

// Finds the lanes stuck that hold something, or not.
void EngineModel::look(State& s) {
  const bool requests = s.requests != 0 && s.requestsAtOnce < kWorkers;
  const bool completions = s.completions != 0 && s.completionsAtOnce < kWorkers;
  const int choice = pick(requests || completions ? 2 : 1);
  if (choice == 1) {
    s.requestsAtOnce = requests ? kWorkers : s.requestsAtOnce;
    s.completionsAtOnce = completions ? kWorkers : s.completionsAtOnce;
  }
}

} // namespace model
