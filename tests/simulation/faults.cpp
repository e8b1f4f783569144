// What goes wrong.
#include <algorithm>
#include <cstring>

#include "peer/frame.h"
#include "trace.h"
#include "world.h"

namespace torch_rpc_mpi::simulation {

bool World::strike() {
  if (faults_ >= scenario_.faults || !random_.chance(60)) {
    return false;
  }
  unsigned total = 0;
  for (const unsigned weight : scenario_.weights) {
    total += weight;
  }
  size_t chosen = random_.below(total);
  size_t fault = 0;
  for (; chosen >= scenario_.weights[fault]; ++fault) {
    chosen -= scenario_.weights[fault];
  }
  const int a = static_cast<int>(random_.below(size_));
  const int b = (a + static_cast<int>(random_.between(1, size_ - 1))) % size_;
  if (!strike(static_cast<Fault>(fault), a, b)) {
    return false;
  }
  ++faults_;
  trace().note("fault", static_cast<int64_t>(fault), a, b);
  return true;
}

bool World::strike(Fault fault, int a, int b) {
  Worker& worker = workers_[a];
  if (worker.dead || worker.stopping) {
    return false;
  }
  switch (fault) {
    case Fault::kSendError:
      network_->arm(a, b, WireFault::kSendError);
      break;
    case Fault::kReceiveError:
      network_->arm(a, b, WireFault::kReceiveError);
      break;
    case Fault::kFlippedField:
      network_->arm(a, b, WireFault::kFlippedField);
      break;
    case Fault::kShortFrame:
      network_->arm(a, b, WireFault::kShortFrame);
      break;
    case Fault::kShortChunk:
      network_->arm(a, b, WireFault::kShortChunk);
      break;
    case Fault::kDeath:
      die(a);
      break;
    case Fault::kPause:
      worker.pausedUntil = steps_ + random_.between(20, 400);
      break;
    case Fault::kStop:
      if (std::ranges::count_if(workers_, &Worker::stopped) >= size_ / 2) {
        return false;
      }
      worker.stopped = true;
      oracle_.stops(a);
      break;
    case Fault::kBroken:
      oracle_.excuseRank(a);
      network_->breakRank(a);
      break;
    case Fault::kNoMemory:
      oracle_.shortOfMemory(a);
      worker.engine->failAllocation(static_cast<int>(random_.below(30)));
      break;
    case Fault::kWrongWorker:
    case Fault::kBadDrain:
    case Fault::kBadCredit:
      return forge(fault, a, b);
    case Fault::kLeave:
    case Fault::kShortJoin:
      if (worker.thread->busy() || worker.leaving) {
        return false;
      }
      worker.shortJoin = fault == Fault::kShortJoin;
      anyShortJoin_ = anyShortJoin_ || worker.shortJoin;
      worker.leaving = true;
      worker.thread->give([this, a, graceful = worker.shortJoin] { leave(a, graceful); });
      break;
    case Fault::kSignal:
      if (!worker.thread->busy()) {
        return false;
      }
      worker.thread->interrupt();
      break;
    case Fault::kCount:
      break;
  }
  return true;
}

void World::die(int rank) {
  oracle_.dead(rank);
  workers_[rank].dead = true;
  network_->end(rank);
  for (int other = 0; other < size_; ++other) {
    if (other != rank) {
      notices_.push_back({rank, other, steps_ + random_.below(300)});
    }
  }
}

void World::tellOfEnds(bool all) {
  std::erase_if(notices_, [&](const Notice& notice) {
    const bool due = all || notice.step <= steps_;
    if (due) {
      network_->tellOfEnd(notice.ended, notice.told);
    }
    return due;
  });
}

// Frames that no agent would send, as one with an error in it could.
bool World::forge(Fault fault, int liar, int victim) {
  FrameHeader header;
  std::string body;
  if (fault == Fault::kWrongWorker) {
    const auto request = network_->someRequest(random_);
    if (!request || request->destination == liar || request->source == liar) {
      return false;
    }
    victim = request->source;
    header.kind = FrameKind::kResponse;
    header.callId = request->id;
  } else if (fault == Fault::kBadCredit) {
    header.kind = FrameKind::kCredit;
    header.releasedRequests = uint64_t{1} << random_.between(9, 63);
  } else {
    header.kind = FrameKind::kDrain;
    struct {
      uint32_t kind, reserved;
      uint64_t sent, received;
    } drain{};
    const bool parent = victim > 0 && (victim - 1) / 2 == liar;
    const bool child = liar > 0 && (liar - 1) / 2 == victim;
    const uint32_t verdict = static_cast<uint32_t>(random_.between(2, 3));
    drain.kind = !child && random_.chance(40) ? 1 : !parent && random_.chance(60) ? verdict : 9;
    body.assign(reinterpret_cast<const char*>(&drain), random_.chance(80) ? sizeof(drain) : 7);
  }
  if (fault != Fault::kWrongWorker) { // which may come too late to matter
    lies_.emplace_back(victim, liar);
  }
  header.bodyBytes = body.size();
  oracle_.excuse(liar, victim);
  network_->forge(liar, victim, std::string(reinterpret_cast<const char*>(&header), sizeof(header)) + body);
  return true;
}

// From here on nothing goes wrong any more; but who is stopped takes nothing yet.
void World::heal() {
  trace().note("healed");
  network_->disarmAll();
  tellOfEnds(true);
  for (Worker& worker : workers_) {
    worker.pausedUntil = 0;
  }
}

// Whether calls are unanswered that need nobody who is stopped.
bool World::pendingBesideStopped() const {
  return oracle_.pendingWithoutExcuse([this](int rank) { return workers_[rank].stopped; }) > 0;
}

// Whether every worker has found out who is dead, and who told it what cannot be.
bool World::endsAreKnown() const {
  const auto mayOverlook = [&](int rank) {
    return workers_[rank].dead || workers_[rank].stopping || workers_[rank].engine->broken();
  };
  for (int rank = 0; rank < size_; ++rank) {
    for (int other = 0; other < size_; ++other) {
      if (workers_[other].dead && !mayOverlook(rank) && oracle_.reasonOf(rank, other).empty()) {
        return false;
      }
    }
  }
  return std::ranges::all_of(lies_, [&](const std::pair<int, int>& lie) {
    return mayOverlook(lie.first) || !oracle_.reasonOf(lie.first, lie.second).empty();
  });
}

} // namespace torch_rpc_mpi::simulation
