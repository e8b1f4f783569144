// Many threads at one engine, for the sanitizers.
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "engine/threaded_engine.h"

using namespace torch_rpc_mpi;

namespace {

struct Counts {
  std::atomic<int> made{0}, ran{0}, dropped{0};
};

class CountedTask final : public Task {
 public:
  CountedTask(Kind which, Counts& counts, std::atomic<bool>* done = nullptr)
      : kind_(which),
        counts_(counts),
        done_(done) {
    ++counts_.made;
  }
  ~CountedTask() override {
    if (!ran_) {
      ++counts_.dropped;
      finish();
    }
  }
  Kind kind() const override {
    return kind_;
  }
  void run() noexcept override {
    CHECK_THAT(!ran_);
    ran_ = true;
    ++counts_.ran;
    finish();
  }
  bool completes(const void* awaited) const override {
    return awaited == done_;
  }

 private:
  void finish() {
    if (done_ != nullptr) {
      *done_ = true;
    }
  }
  const Kind kind_;
  Counts& counts_;
  std::atomic<bool>* const done_;
  bool ran_ = false;
};

// A network of one: what was sent arrives with a later turn.
class StressedDriver final : public EngineDriver {
 public:
  bool turn(ProgressToken&, std::vector<TaskPtr>& tasks) override {
    ++turns_; // by the token's holder alone: unguarded on purpose
    std::vector<TaskPtr> sent;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      sent.swap(sent_);
      queued_ = false;
    }
    std::move(underWay_.begin(), underWay_.end(), std::back_inserter(tasks));
    underWay_ = std::move(sent);
    return !tasks.empty();
  }
  bool hasQueued() const override {
    return queued_;
  }
  Clock::time_point nextDeadline() const override {
    return Clock::time_point::max();
  }
  bool awaitsAnswers() const override {
    return true;
  }
  bool rests() const override {
    return false;
  }
  void onBroken(const std::string&, std::vector<TaskPtr>&) noexcept override {}
  void send(TaskPtr task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sent_.push_back(std::move(task));
    queued_ = true;
  }

 private:
  std::mutex mutex_;
  std::vector<TaskPtr> sent_;
  std::atomic<bool> queued_{false};
  std::vector<TaskPtr> underWay_;
  uint64_t turns_ = 0;
};

struct StressedEngine {
  explicit StressedEngine(IdlingOptions idling) {
    EngineOptions options;
    options.numWorkerThreads = 3;
    options.idling = idling;
    engine = std::make_shared<ThreadedEngine>(options, driver, bell);
    engine->start();
  }
  StressedDriver driver;
  BellWord bell;
  std::shared_ptr<ThreadedEngine> engine;
};

// What a user's thread does, over and over.
void use(StressedEngine& running, Counts& counts, int round) {
  const auto make = [&](Task::Kind kind, std::atomic<bool>* done = nullptr) {
    return std::make_unique<CountedTask>(kind, counts, done);
  };
  switch (round % 5) {
    case 0:
      running.driver.send(make(Task::Kind::kRequest));
      running.engine->submitted(/*expectsReply=*/false);
      break;
    case 1:
      running.engine->post(make(round % 2 == 0 ? Task::Kind::kCompletion : Task::Kind::kSecondAttempt));
      break;
    case 2: { // a call for whose answer its thread drives
      std::atomic<bool> done{false};
      Engine::announceGuest(true);
      running.driver.send(make(Task::Kind::kCompletion, &done));
      running.engine->submitted(/*expectsReply=*/true);
      running.engine->driveFor(&done, [&] { return done.load(); });
      while (!done) {
        std::this_thread::yield();
      }
      break;
    }
    case 3:
      running.driver.send(make(Task::Kind::kCompletion));
      running.engine->submitted(/*expectsReply=*/true);
      break;
    default:
      running.engine->wake();
      CHECK_THAT(running.engine->counts().threads > 0);
  }
}

constexpr int kUsers = 4;

void stress(IdlingOptions idling) {
  constexpr int kRounds = 2000;
  StressedEngine running(idling);
  Counts counts;
  std::vector<std::thread> users;
  for (int user = 0; user < kUsers; ++user) {
    users.emplace_back([&, user] {
      for (int round = 0; round < kRounds; ++round) {
        use(running, counts, round + user);
      }
    });
  }
  for (std::thread& user : users) {
    user.join();
  }
  while (counts.ran != counts.made) { // what is left comes with the turns of the engine's threads
    std::this_thread::yield();
  }
  CHECK_THAT(running.engine->stop(std::chrono::seconds(30)));
  CHECK_EQUAL(counts.dropped.load(), 0);
}

} // namespace

TEST(engine_stress_runs_each_task_once_while_it_polls) {
  stress({.spinTime = std::chrono::milliseconds(1)});
}

TEST(engine_stress_runs_each_task_once_while_it_sleeps) {
  stress({.spinTime = std::chrono::nanoseconds(0), .scarce = false});
}

TEST(engine_stress_runs_or_drops_each_task_when_it_stops) {
  for (int engine = 0; engine < 20; ++engine) {
    Counts counts;
    {
      StressedEngine running({.spinTime = std::chrono::microseconds(10 * engine)});
      std::atomic<bool> stopping{false};
      std::vector<std::thread> users;
      for (int user = 0; user < kUsers; ++user) {
        users.emplace_back([&] {
          for (int round = 0; !stopping; ++round) {
            running.engine->post(std::make_unique<CountedTask>(Task::Kind::kRequest, counts));
            running.engine->submitted(round % 2 == 0);
          }
        });
      }
      while (counts.ran < 50) {
        std::this_thread::yield();
      }
      CHECK_THAT(running.engine->stop(std::chrono::seconds(30)));
      stopping = true;
      for (std::thread& user : users) {
        user.join();
      }
    }
    CHECK_EQUAL(counts.ran + counts.dropped, counts.made.load());
  }
}
