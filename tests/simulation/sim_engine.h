// An engine without threads: a scheduler says when it takes a turn and which of its tasks it runs.
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "random.h"

namespace torch_rpc_mpi::simulation {

class SimEngine final : public Engine {
 public:
  // `othersRun` is called where another thread could run instead of the one that calls the engine.
  SimEngine(int rank, EngineDriver& driver, Random& random, std::function<void()> othersRun);
  ~SimEngine() override;

  void start() override {
    started_ = true;
  }
  bool stop(std::chrono::milliseconds limit) override;
  using Engine::post;
  void post(std::vector<TaskPtr>& tasks) override;
  void submitted(bool expectsReply) override;
  void driveFor(const void* awaited, const std::function<bool()>& over) override;
  void withToken(const std::function<void(ProgressToken&)>& body) override;
  void wake() override {
    othersRun_();
  }
  EngineCounts counts() const override;
  std::optional<size_t> queuedBefore(const std::function<bool(const Task&)>& isIt) const override;
  bool onEngineThread() const override {
    return current == this;
  }

  // For the scheduler.
  bool leads() const { // whether somebody would take turns
    return started_ && !stopping_ && !broken_;
  }
  bool broken() const {
    return broken_;
  }
  bool turn(); // whether anything happened
  // There is no memory once, after so many allocations of the next turn or task.
  void failAllocation(int after) {
    failsAfter_ = after;
  }
  bool hasTasks() const {
    return !tasks_.empty() && !stopping_;
  }
  void runTask();           // any of them: each may have a thread of its own
  static bool tokenHeld() { // of any engine
    return held > 0;
  }

 private:
  class Hold;
  class MemoryFault;
  bool turnOnce(std::vector<TaskPtr>& tasks);
  void breakDown(const std::string& reason);

  static inline thread_local SimEngine* current = nullptr;
  static inline int held = 0;
  const int rank_;
  EngineDriver& driver_;
  Random& random_;
  const std::function<void()> othersRun_;
  TokenSource tokens_;
  std::deque<TaskPtr> tasks_;
  int running_ = 0;
  int failsAfter_ = -1;
  bool started_ = false, stopping_ = false, broken_ = false;
};

} // namespace torch_rpc_mpi::simulation
