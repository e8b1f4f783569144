// What users call, and what becomes of it.
#include <stdexcept>
#include <utility>

#include "allocations.h"
#include "trace.h"
#include "world.h"

namespace torch_rpc_mpi::simulation {

namespace rpc = torch::distributed::rpc;

thread_local bool World::inSend = false;

namespace {

constexpr int kDeepest = 2; // calls that calls lead to
constexpr float kLong = 30; // seconds

} // namespace

Call World::plan(int from, int to, int depth) {
  Call call;
  call.from = from;
  call.to = to;
  call.depth = depth;
  const size_t choice = random_.below(100);
  if (choice < 10) {
    call.function = Function::kThrow;
    call.mayFail = true;
  } else if (choice < 25) {
    call.function = Function::kHold;
  } else if (choice < 40 && depth < kDeepest) {
    call.function = Function::kNested;
  } else if (choice < 44 && scenario_.name != "calm") {
    call.function = Function::kNoMemory;
    call.mayFail = true;
  }
  call.shortTimeout = depth == 0 && random_.chance(10);
  call.padding = random_.chance(20) ? random_.below(1500) : random_.below(40);
  for (size_t tensors = random_.chance(50) ? random_.between(1, 3) : 0; tensors > 0; --tensors) {
    constexpr std::array<size_t, 8> kSizes{0, 1, 100, 129, 256, 257, 1000, 2048};
    call.tensors.push_back(kSizes[random_.below(kSizes.size())]);
  }
  return call;
}

bool World::userCalls(int rank) {
  Worker& worker = workers_[rank];
  if (!runs(rank) || worker.leaving || oracle_.callsMade() > 60) {
    return false;
  }
  if (random_.chance(15) && !worker.thread->busy()) {
    worker.thread->give([this, rank] { blockingCall(rank); });
    return true;
  }
  call(rank, static_cast<int>(random_.below(size_)), 0);
  return true;
}

int World::call(int from, int to, int depth, const std::function<void(bool)>& then) {
  const testing::OwnAllocations own;
  Worker& worker = workers_[from];
  noteLosses(from);
  const int index = oracle_.made(plan(from, to, depth)).index;
  const bool lost = !oracle_.reasonOf(from, to).empty();
  const float timeout = oracle_.call(index).shortTimeout ? 0.001F * static_cast<float>(random_.between(1, 200)) : kLong;
  JitFuturePtr future;
  const bool before = std::exchange(inSend, true);
  try {
    future = worker.agent->send(
        worker.agent->getWorkerInfo(static_cast<rpc::worker_id_t>(to)), questionOf(oracle_.call(index)), timeout);
  } catch (const std::exception& error) {
    inSend = before;
    oracle_.refused(index, error.what(), worker.stopping || worker.engine->broken());
    if (then) {
      then(false);
    }
    return index;
  }
  inSend = before;
  if (lost && !UserThread::here() && future->completed()) { // a thread that was paused has given it the time
    trace().fail("send() returns a completed future for a call to a lost worker");
  }
  listen(index, future, then);
  return index;
}

// As Python's rpc_sync does: send() waits for the answer itself.
void World::blockingCall(int rank) {
  Worker& worker = workers_[rank];
  noteLosses(rank);
  const int index = oracle_.made(plan(rank, static_cast<int>(random_.below(size_)), kDeepest)).index;
  JitFuturePtr future;
  try {
    const Caller::AnswerInSend answered(worker.agent->caller());
    const Call& call = oracle_.call(index);
    future = worker.agent->send(
        worker.agent->getWorkerInfo(static_cast<rpc::worker_id_t>(call.to)), questionOf(call), kLong);
  } catch (const std::exception& error) { // a signal ends the wait, and the call with it
    oracle_.refused(index, error.what(), true);
    return;
  }
  listen(index, future, nullptr);
}

void World::listen(int index, const JitFuturePtr& future, const std::function<void(bool)>& then) {
  try {
    future->addCallback([this, index, then](rpc::JitFuture& done) { onCompleted(index, done, then); });
  } catch (const std::runtime_error&) { // of a callback that runs here, because the call is complete already
  }
}

void World::onCompleted(int index, rpc::JitFuture& future, const std::function<void(bool)>& then) {
  const testing::OwnAllocations own;
  if (SimEngine::tokenHeld()) {
    trace().fail("a callback runs while the progress token is held");
  }
  if (inSend) {
    trace().fail("a future completes inside send()");
  }
  const bool answered = !future.hasError();
  const int from = oracle_.call(index).from;
  noteLosses(from);
  oracle_.completed(index, answered ? "" : future.tryRetrieveErrorMessage());
  if (answered) {
    const std::string wrong = checkAnswer(oracle_.call(index), *future.value().toCustomClass<rpc::Message>());
    if (!wrong.empty()) {
      trace().fail("the answer of call " + std::to_string(index) + ": " + wrong);
    }
  }
  if (then) {
    then(answered);
  } else if (index % 9 == 1) {
    throw std::runtime_error("a callback failed");
  } else if (index % 9 == 2 && oracle_.call(index).depth < kDeepest && phase_ == Phase::kTraffic) {
    call(from, static_cast<int>(random_.below(size_)), oracle_.call(index).depth + 1);
  }
}

void World::serveNested(int outer, const std::function<void(bool)>& then) {
  const int callee = oracle_.call(outer).to;
  const int inner = static_cast<int>(oracle_.callsMade());
  oracle_.call(outer).inner = inner;
  call(
      callee, static_cast<int>(random_.below(size_)), oracle_.call(outer).depth + 1,
      [this, outer, then](bool answered) {
        if (!answered) {
          oracle_.call(outer).mayFail = true;
        }
        then(answered);
      });
}

void World::noteLosses(int rank) {
  for (const Membership::Loss& loss : workers_[rank].agent->lostWorkers()) {
    oracle_.lost(rank, loss.rank, loss.reason);
  }
}

} // namespace torch_rpc_mpi::simulation
