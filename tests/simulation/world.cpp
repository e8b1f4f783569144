#include "world.h"

#include <algorithm>
#include <utility>

#include "allocations.h"
#include "peer/receive_pool.h"
#include "sim_transport.h"
#include "trace.h"

namespace torch_rpc_mpi::simulation {

namespace {

constexpr auto kBeginning = std::chrono::seconds(1);
constexpr int kNestedSteps = 3;

} // namespace

World::World(uint64_t seed, const Scenario& scenario, UserThreads& threads)
    : scenario_(scenario),
      random_(seed),
      time_(Clock::duration(kBeginning).count()),
      size_(static_cast<int>(random_.chance(80) ? 4 : random_.between(5, kMostRanks))),
      oracle_(size_),
      network_(std::make_unique<Network>(size_, random_, time_)),
      workers_(size_) {
  Clock::simulate(&time_);
  ReceivePool::instance().trim(Clock::time_point::max()); // nothing of another run, which would change this one
  network_->onStruck = [this](int a, int b) { oracle_.excuse(a, b); };
  for (int rank = 0; rank < size_; ++rank) {
    workers_[rank].thread = &threads[rank];
  }
}

World::~World() {
  workers_.clear();
  Clock::simulate(nullptr);
}

void World::start() {
  AgentOptions options;
  options.rpcTimeout = std::chrono::seconds(30);
  options.exchange.eagerLimit = 128;
  options.exchange.bulkChunk = 256;
  options.exchange.windowRequests = random_.between(2, 8);
  options.exchange.windowBytes = 1024;
  const bool someStop = scenario_.weights[static_cast<size_t>(Fault::kStop)] > 0; // all but one, with those that die
  options.exchange.untakenBudget = someStop ? random_.between(12, 24) : random_.between(4, 16);
  network_->cells = options.exchange.untakenBudget + options.exchange.untakenBudget / 4;
  options.signals = UserThread::service();
  options.slotUsesBefore = random_.chance(50) ? UINT32_MAX - static_cast<uint32_t>(random_.below(3)) : 0;
  std::vector<GroupMember> members;
  for (int rank = 0; rank < size_; ++rank) {
    members.push_back({Oracle::nameOf(rank), "host" + std::to_string(rank)});
  }
  for (int rank = 0; rank < size_; ++rank) {
    Worker& worker = workers_[rank];
    auto service = std::make_unique<Service>(
        oracle_, [this](int outer, const std::function<void(bool)>& then) { serveNested(outer, then); });
    worker.service = service.get();
    options.makeEngine = [&](const EngineOptions&, EngineDriver& driver, BellWord&) {
      auto engine = std::make_shared<SimEngine>(rank, driver, random_, [this] { othersRun(); });
      worker.engine = engine.get();
      return engine;
    };
    worker.agent = std::make_shared<MpiAgent>(
        std::make_unique<SimTransport>(*network_, rank), members, std::move(service), options);
  }
  for (Worker& worker : workers_) {
    worker.agent->start();
  }
}

void World::run() {
  start();
  const size_t traffic = random_.between(150, 500);
  while (steps_ < traffic) {
    step();
  }
  phase_ = Phase::kSettling;
  heal();
  stepUntil([this] { return !pendingBesideStopped(); }, 20000, "a call is unanswered because another rank is stopped");
  for (Worker& worker : workers_) {
    worker.stopped = false;
  }
  stepUntil(
      [this] { return oracle_.pendingWithoutExcuse() == 0 && endsAreKnown(); }, 20000,
      "a call is unanswered, or a death or a lie not found, although nothing is in the way");
  phase_ = Phase::kLeaving;
  stepUntil(
      [this] {
        askToLeave();
        return std::ranges::all_of(workers_, [](const Worker& worker) { return worker.dead || worker.left; });
      },
      40000, "a worker that leaves waits for ever");
  clearAway();
}

void World::stepUntil(const std::function<bool()>& over, size_t limit, const std::string& violated) {
  const size_t end = steps_ + limit;
  while (!over()) {
    if (steps_ >= end) {
      trace().fail(violated + "; a call that is pending: " + oracle_.aPendingCall());
    }
    step();
  }
}

// ---- steps ----

void World::step() {
  ++steps_;
  network_->stepped();
  tellOfEnds(false);
  const bool happened = act();
  idleSteps_ = happened ? 0 : idleSteps_ + 1;
  if (idleSteps_ >= 30) {
    passTime(true);
  }
}

bool World::act() {
  const int rank = static_cast<int>(random_.below(size_));
  const size_t choice = random_.below(100);
  if (choice < 32) {
    return turn(rank);
  }
  if (choice < 52) {
    return runTask(rank);
  }
  if (choice < 72) {
    return deliver();
  }
  if (choice < 76) {
    passTime(false);
    return false;
  }
  if (choice < 84) {
    return phase_ == Phase::kTraffic && userCalls(rank);
  }
  if (choice < 88) {
    return release(rank);
  }
  if (choice < 90) {
    return phase_ == Phase::kTraffic && strike();
  }
  if (choice < 91) {
    network_->touchParked();
    return false;
  }
  return resume(rank);
}

bool World::turn(int rank) {
  if (!runs(rank) || !workers_[rank].engine->leads()) {
    return false;
  }
  const bool active = workers_[rank].engine->turn();
  if (active) {
    trace().note("turn", rank);
  }
  noteLosses(rank);
  return active;
}

bool World::runTask(int rank) {
  if (!runs(rank) || !workers_[rank].engine->hasTasks()) {
    return false;
  }
  trace().note("task", rank);
  workers_[rank].engine->runTask();
  return true;
}

bool World::deliver() {
  return network_->deliver();
}

bool World::release(int rank) {
  Worker& worker = workers_[rank];
  if (!runs(rank) || worker.service->held() == 0 || (phase_ == Phase::kTraffic && random_.chance(50))) {
    return false;
  }
  worker.service->release(random_.below(worker.service->held()));
  return true;
}

bool World::resume(int rank) {
  Worker& worker = workers_[rank];
  if (!runs(rank) || !worker.thread->busy()) {
    return false;
  }
  worker.thread->resume();
  noteLosses(rank);
  return false; // it mostly finds that it has to wait on
}

// Where a thread is between two steps of its own.
void World::othersRun() {
  if (SimEngine::tokenHeld() || !random_.chance(30)) {
    return;
  }
  if (UserThread::here()) {
    UserThread::pause();
    return;
  }
  if (nested_ > 0) {
    return;
  }
  const testing::OwnAllocations own;
  ++nested_;
  const bool before = std::exchange(inSend, false);
  for (size_t i = random_.below(kNestedSteps + 1); i > 0; --i) {
    const int rank = static_cast<int>(random_.below(size_));
    switch (random_.below(3)) {
      case 0:
        turn(rank);
        break;
      case 1:
        runTask(rank);
        break;
      default:
        deliver();
        break;
    }
  }
  inSend = before;
  --nested_;
}

// The longer nothing happens the more, so that whatever waits for a time comes to it.
void World::passTime(bool idle) {
  using namespace std::chrono;
  nanoseconds most = milliseconds(phase_ == Phase::kLeaving ? 60 : 2);
  if (idle) {
    const size_t longer = std::min<size_t>(idleSteps_ / 30, 12);
    most = std::min<nanoseconds>(
        milliseconds(1) * (1 << longer), phase_ == Phase::kLeaving ? milliseconds(100) : milliseconds(20));
  }
  time_ += static_cast<Clock::rep>(random_.below(static_cast<size_t>(most.count())));
}

} // namespace torch_rpc_mpi::simulation
