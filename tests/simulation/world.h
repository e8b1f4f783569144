// Several agents in one process, and the one scheduler that decides what each of their threads does next.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "agent/mpi_agent.h"
#include "network.h"
#include "oracle.h"
#include "scenario.h"
#include "service.h"
#include "sim_engine.h"
#include "user_thread.h"

namespace torch_rpc_mpi::simulation {

inline constexpr int kMostRanks = 6;
using UserThreads = std::array<UserThread, kMostRanks>; // kept from run to run

// One run. Its phases: workers call one another while faults strike; no more faults, and what was called without one in
// its way is answered, first among those that are not stopped; all leave; what is left of dead workers is cleared away.
class World {
 public:
  World(uint64_t seed, const Scenario& scenario, UserThreads& threads);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // Ends the process when something does not hold.
  void run();
  size_t steps() const {
    return steps_;
  }

 private:
  struct Worker {
    std::shared_ptr<MpiAgent> agent;
    SimEngine* engine = nullptr;
    Service* service = nullptr;
    UserThread* thread = nullptr;
    bool dead = false;
    bool leaving = false;  // its user makes no more calls
    bool stopping = false; // in shutdown, or behind it
    bool left = false;
    bool shortJoin = false;
    bool calledBetween = false; // two attempts to join
    bool follows = false;       // it leaves because another was lost
    size_t pausedUntil = 0;     // step
    bool stopped = false;
  };
  struct Notice { // of the end of a process
    int ended, told;
    size_t step;
  };
  enum class Phase { kTraffic, kSettling, kLeaving };

  void start();
  bool runs(int rank) const {
    const Worker& worker = workers_[rank];
    return !worker.dead && !worker.stopped && steps_ >= worker.pausedUntil;
  }

  // Steps. Each returns whether something happened.
  void step();
  bool act();
  bool turn(int rank);
  bool runTask(int rank);
  bool deliver();
  bool userCalls(int rank);
  bool release(int rank);
  bool resume(int rank);
  void othersRun();
  void passTime(bool idle);
  void stepUntil(const std::function<bool()>& over, size_t limit, const std::string& violated);

  // Calls, calls.cpp.
  Call plan(int from, int to, int depth);
  int call(int from, int to, int depth, const std::function<void(bool)>& then = nullptr);
  void blockingCall(int rank);
  void listen(int index, const JitFuturePtr& future, const std::function<void(bool)>& then);
  void onCompleted(int index, torch::distributed::rpc::JitFuture& future, const std::function<void(bool)>& then);
  void serveNested(int outer, const std::function<void(bool)>& then);
  void noteLosses(int rank);

  // Faults, faults.cpp.
  bool strike();
  bool strike(Fault fault, int a, int b);
  void die(int rank);
  void tellOfEnds(bool all);
  bool forge(Fault fault, int liar, int victim);
  void heal();
  bool pendingBesideStopped() const;
  bool endsAreKnown() const;

  // Leaving, leaving.cpp.
  void leave(int rank, bool graceful);
  void askToLeave();
  bool joins(int rank);
  void checkJoinFailure(int rank, const std::string& error);
  void checkAgreement(int rank);
  void clearAway();

  const Scenario& scenario_;
  Random random_;
  std::atomic<Clock::rep> time_;
  const int size_;
  Oracle oracle_;
  std::unique_ptr<Network> network_;
  std::vector<Worker> workers_;
  std::vector<Notice> notices_;
  std::vector<std::pair<int, int>> lies_; // who has been told a lie by whom
  Phase phase_ = Phase::kTraffic;
  size_t steps_ = 0;
  size_t idleSteps_ = 0;
  unsigned faults_ = 0;
  int nested_ = 0;
  bool anyShortJoin_ = false;
  static thread_local bool inSend;
};

} // namespace torch_rpc_mpi::simulation
