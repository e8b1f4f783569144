// How workers leave, each in its user's thread.
#include <algorithm>
#include <climits>

#include "agent/farewell.h"
#include "trace.h"
#include "world.h"

namespace torch_rpc_mpi::simulation {

namespace {

constexpr float kPatience = 20; // seconds, where a fault may keep others from joining

} // namespace

// Whoever is not in a call any more.
void World::askToLeave() {
  for (int rank = 0; rank < size_; ++rank) {
    Worker& worker = workers_[rank];
    if (!worker.dead && !worker.leaving && !worker.thread->busy()) {
      worker.leaving = true;
      worker.thread->give([this, rank] { leave(rank, true); });
    }
  }
}

void World::leave(int rank, bool graceful) {
  Worker& worker = workers_[rank];
  trace().note("leaves", rank, graceful ? 1 : 0);
  if (!graceful || !joins(rank)) {
    oracle_.excuseRank(rank);
    worker.follows = graceful && !worker.agent->lostWorkers().empty();
  }
  worker.stopping = true;
  trace().note("shuts down", rank);
  try {
    worker.agent->shutdown();
  } catch (const Interrupted&) { // when all was done
  }
  worker.left = true;
  trace().note("has left", rank);
}

// Whether all have agreed. A join that a signal ended or that timed out is tried again.
bool World::joins(int rank) {
  Worker& worker = workers_[rank];
  for (int attempt = 0; attempt < 3; ++attempt) {
    const bool briefly = worker.shortJoin && attempt == 0;
    const bool forever = scenario_.faults == 0;
    try {
      worker.agent->join(
          true,
          briefly       ? 0.001F * static_cast<float>(random_.between(1, 300))
              : forever ? 0
                        : kPatience);
      trace().note("agreed", rank);
      checkAgreement(rank);
      return true;
    } catch (const Interrupted&) {
      trace().note("interrupted", rank);
      anyShortJoin_ = true; // as one that timed out: the others may agree without it
    } catch (const std::exception& error) {
      trace().note("join fails", rank);
      checkJoinFailure(rank, error.what());
      if (!briefly) {
        return false;
      }
      worker.calledBetween = random_.chance(50);
      network_->lateCallers = network_->lateCallers || worker.calledBetween;
      if (worker.calledBetween) { // of which no agreement of the others can know; it leads to no other
        oracle_.excuseRank(rank);
        call(rank, random_.chance(60) ? rank : static_cast<int>(random_.below(size_)), INT_MAX);
      }
    }
  }
  return false;
}

void World::checkJoinFailure(int rank, const std::string& error) {
  noteLosses(rank);
  bool excused = anyShortJoin_;
  bool knows = false;
  bool told = error.find("on an earlier graceful shutdown") != std::string::npos && anyShortJoin_;
  for (int other = 0; other < size_; ++other) {
    excused = excused || oracle_.excused(rank, other);
    const std::string& reason = oracle_.reasonOf(rank, other);
    knows = knows || !reason.empty();
    told = told || (!reason.empty() && error.find(reason) != std::string::npos);
  }
  for (int other = 0; other < size_; ++other) {
    // Or the cause for which a worker has left that has told it, and another that one before.
    for (int first = 0; first < size_ && knows; ++first) {
      const std::string cause = oracle_.reasonOf(first, other).substr(0, kFarewellBytes);
      told = told || (!cause.empty() && error.find(cause) != std::string::npos);
    }
  }
  const auto wrong = [&](const std::string& what) {
    trace().fail("the join of rank " + std::to_string(rank) + " " + what + ": " + error);
  };
  for (int other = 0; other < size_; ++other) {
    // Its goodbye, unless it was lost otherwise, tells the loss for which it leaves.
    const std::string& reason = oracle_.reasonOf(rank, other);
    const bool followed = workers_[other].follows && reason.find("it has left") != std::string::npos;
    if (followed && error.find(reason) != std::string::npos && !oracle_.wordsFail()) {
      wrong("names one that has only followed another");
    }
  }
  const bool timedOut = error.find("timed out") != std::string::npos && !told;
  if (timedOut && knows) {
    wrong("waits although it knows of a loss");
  }
  if (!timedOut && !told && !oracle_.wordsFail()) {
    wrong("does not tell why it fails");
  }
  const bool anyFault = faults_ > 0; // a loss elsewhere keeps this rank waiting
  if (!excused && !(timedOut && anyFault)) {
    wrong("fails without a reason");
  }
}

void World::checkAgreement(int rank) {
  const auto wrong = [&](const std::string& what) {
    trace().fail("the join of rank " + std::to_string(rank) + " succeeds although " + what);
  };
  // Of calls that were made between two attempts to join, and of what they led to, only their maker has to know.
  const auto late = std::ranges::count_if(workers_, &Worker::calledBetween);
  for (int other = 0; other < size_; ++other) {
    const bool counts = late == 0 || (late == 1 && other == rank && workers_[rank].calledBetween);
    if (counts && !workers_[other].dead && oracle_.pendingOf(other) > 0) {
      wrong("calls of rank " + std::to_string(other) + " are under way");
    }
  }
  for (const Worker& worker : workers_) {
    if (!worker.dead && !worker.leaving) {
      wrong("another has not joined");
    }
    // Where there was no memory to wait for the future of a function, its caller has that error, and nobody waits.
    const auto rank = static_cast<int>(&worker - workers_.data());
    if (!worker.dead && late == 0 && worker.service->held() > 0 && !oracle_.isShortOfMemory(rank)) {
      wrong("another still serves a call");
    }
  }
}

// Dead workers: their threads, and what they would still free.
void World::clearAway() {
  for (int rank = 0; rank < size_; ++rank) {
    Worker& worker = workers_[rank];
    if (!worker.dead) {
      continue;
    }
    trace().note("cleared away", rank);
    while (worker.thread->busy()) {
      worker.thread->interrupt();
      worker.thread->resume();
    }
    worker.thread->give([&worker] {
      try {
        worker.agent->shutdown();
      } catch (const Interrupted&) { // left over from its wait
      }
    });
    while (worker.thread->busy()) {
      worker.thread->resume();
    }
  }
  oracle_.checkAllCompleted();
  for (Worker& worker : workers_) {
    worker.agent.reset();
  }
  network_->touchParked();
}

} // namespace torch_rpc_mpi::simulation
