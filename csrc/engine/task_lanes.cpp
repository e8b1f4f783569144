#include "engine/task_lanes.h"

#include <algorithm>
#include <iterator>

namespace torch_rpc_mpi {

namespace {

// Completions that run at once, without those that wait for calls of their own: a user's callback that waits for
// another call needs a thread more, which completes that.
constexpr int kCompletionThreads = 48;
// Those that wait included: where a program that waits without end is stopped from taking all threads there are.
constexpr int kAllThreads = 2048;
// How long no task of a kind ends, while others wait, before more of them run at once. Completions are short by nature;
// what holds them up is usually the GIL, which Python's threads pass on every 5 ms.
constexpr auto kStuckRequests = std::chrono::milliseconds(1);
constexpr auto kStuckCompletions = std::chrono::milliseconds(10);

} // namespace

TaskLanes::TaskLanes(int numWorkerThreads, int coresToSpare)
    : numWorkerThreads_(numWorkerThreads),
      coresToSpare_(coresToSpare) {}

void TaskLanes::add(std::vector<TaskPtr>& tasks) {
  for (TaskPtr& task : tasks) {
    Lane& to = lane(task->kind());
    task->place = ++to.places;
    to.queueOf(task->kind()).push_back(std::move(task));
  }
  tasks.clear();
  update();
}

TaskPtr TaskLanes::take() {
  const bool completion = mayRun(Task::Kind::kCompletion);
  Lane& from = lane(completion ? Task::Kind::kCompletion : Task::Kind::kRequest);
  std::deque<TaskPtr>& queue = completion ? from.queue
      : mayTakeSecondAttempt()            ? from.secondAttempts
      : from.running < numWorkerThreads_  ? from.first()
                                          : from.creations;
  TaskPtr task = std::move(queue.front());
  queue.pop_front();
  ++from.running;
  update();
  return task;
}

void TaskLanes::mayWait(Task::Kind kind) {
  ++lane(kind).waiting;
  update();
}

void TaskLanes::blocks(bool forValue) {
  ++lane(Task::Kind::kRequest).blocked;
  lane(Task::Kind::kRequest).forValue += forValue ? 1 : 0;
  update();
}

void TaskLanes::comesBack(bool forValue) {
  ++lane(Task::Kind::kRequest).back;
  lane(Task::Kind::kRequest).forValue -= forValue ? 1 : 0;
  update();
}

bool TaskLanes::hasPlace() const {
  const Lane& of = lane(Task::Kind::kRequest);
  return of.running - of.blocked < numWorkerThreads_;
}

void TaskLanes::goesOn() {
  --lane(Task::Kind::kRequest).blocked;
  --lane(Task::Kind::kRequest).back;
  update();
}

void TaskLanes::ended(Task::Kind kind, bool didWait) {
  --lane(kind).running;
  lane(kind).waiting -= didWait ? 1 : 0;
  ++lane(kind).ended;
  update();
}

void TaskLanes::look() {
  const auto now = Clock::now();
  for (const Task::Kind kind : {Task::Kind::kCompletion, Task::Kind::kRequest}) {
    Lane& each = lane(kind);
    if (each.queued() == 0 || each.ended != each.endedAtLook) {
      each.endedAtLook = each.ended;
      each.stuckSince = now;
    } else if (now - each.stuckSince >= (kind == Task::Kind::kRequest ? kStuckRequests : kStuckCompletions)) {
      each.atOnce = std::min(each.atOnce * 2, limitOf(kind));
      each.stuckSince = now;
    }
  }
  update();
}

std::deque<TaskPtr> TaskLanes::takeAll() {
  std::deque<TaskPtr> all;
  for (Lane& each : lanes_) {
    for (std::deque<TaskPtr>* queue : {&each.secondAttempts, &each.creations, &each.queue}) {
      std::move(queue->begin(), queue->end(), std::back_inserter(all));
      queue->clear();
    }
  }
  update();
  return all;
}

std::optional<size_t> TaskLanes::requestsBefore(const std::function<bool(const Task&)>& isIt) const {
  const Lane& of = lane(Task::Kind::kRequest);
  const Task* found = nullptr;
  for (const std::deque<TaskPtr>* queue : {&of.secondAttempts, &of.creations, &of.queue}) {
    const auto task = std::ranges::find_if(*queue, [&](const TaskPtr& each) { return isIt(*each); });
    found = task != queue->end() ? task->get() : found;
  }
  if (found == nullptr) {
    return std::nullopt;
  }
  const auto before = [&](const std::deque<TaskPtr>& queue) {
    return std::ranges::count_if(queue, [&](const TaskPtr& task) { return task->place < found->place; });
  };
  const bool isSecond = found->kind() == Task::Kind::kSecondAttempt;
  const size_t second = isSecond ? before(of.secondAttempts) : of.secondAttempts.size();
  return second + (isSecond ? 0 : before(of.creations) + before(of.queue));
}

bool TaskLanes::backlog() const {
  for (const Task::Kind kind : {Task::Kind::kCompletion, Task::Kind::kRequest}) {
    if (lane(kind).running > 0 && mayTakeAnother(kind)) {
      return true;
    }
  }
  return false;
}

int TaskLanes::running() const {
  return lanes_[0].running + lanes_[1].running;
}

bool TaskLanes::mayRun(Task::Kind kind) const {
  const Lane& of = lane(kind);
  return mayTakeAnother(kind) && of.running - of.waiting < of.atOnce;
}

bool TaskLanes::mayTakeAnother(Task::Kind kind) const {
  const Lane& of = lane(kind);
  if (kind == Task::Kind::kRequest) {
    const bool any = !of.queue.empty() || !of.creations.empty();
    return (any && of.running < numWorkerThreads_) || mayTakeSecondAttempt() || mayTakeCreation();
  }
  return !of.queue.empty() && of.running - of.waiting < kCompletionThreads && of.running < kAllThreads;
}

bool TaskLanes::mayTakeSecondAttempt() const {
  const Lane& of = lane(Task::Kind::kRequest);
  return !of.secondAttempts.empty() && of.running - of.blocked + of.back < numWorkerThreads_ &&
      of.running < kAllThreads;
}

bool TaskLanes::mayTakeCreation() const {
  const Lane& of = lane(Task::Kind::kRequest);
  return !of.creations.empty() && of.running - of.forValue < numWorkerThreads_ && of.running < kAllThreads;
}

int TaskLanes::limitOf(Task::Kind kind) const {
  return kind == Task::Kind::kRequest ? numWorkerThreads_ : kCompletionThreads;
}

void TaskLanes::update() {
  for (Lane& each : lanes_) {
    if (each.queued() == 0) {
      each.atOnce = coresToSpare_;
    }
  }
  runnable_ = mayRun(Task::Kind::kCompletion) || mayRun(Task::Kind::kRequest);
}

} // namespace torch_rpc_mpi
