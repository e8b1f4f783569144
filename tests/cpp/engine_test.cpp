#include "engine/threaded_engine.h"

#include <algorithm>
#include <future>
#include <latch>
#include <semaphore>
#include <thread>

#include <sched.h>
#include <unistd.h>

#include "check.h"
#include "no_threads.h"

using namespace torch_rpc_mpi;

namespace {

struct FunctionTask final : Task {
  FunctionTask(Kind which, std::function<void()> what)
      : FunctionTask(which, [what = std::move(what)](const FunctionTask&) { what(); }) {}
  FunctionTask(Kind which, std::function<void(const FunctionTask&)> what) : kind_(which), body(std::move(what)) {}
  Kind kind() const override {
    return kind_;
  }
  void run() noexcept override {
    body(*this);
  }
  bool completes(const void* what) const override {
    return awaited == what;
  }
  const void* awaited = this;
  int arrival = -1; // in which order a turn has yielded it
  const Kind kind_;
  std::function<void(const FunctionTask&)> body;
};

// A driver that hands out what was queued, and counts its turns.
struct Driver : EngineDriver {
  bool turn(ProgressToken&, std::vector<TaskPtr>& tasks) override {
    CHECK_THAT(!inside.exchange(true)); // never two at once
    turns.fetch_add(1);
    bool moved = false;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      moved = !queue.empty();
      for (std::unique_ptr<FunctionTask>& task : queue) {
        task->arrival = arrivals++;
        tasks.push_back(std::move(task));
      }
      queue.clear();
    }
    const bool fail = broken;
    inside = false;
    if (fail) {
      throw std::runtime_error("the wire is cut");
    }
    return moved;
  }
  bool hasQueued() const override {
    const std::lock_guard<std::mutex> lock(mutex);
    return !queue.empty();
  }
  Clock::time_point nextDeadline() const override {
    return Clock::time_point::max();
  }
  bool awaitsAnswers() const override {
    return false;
  }
  bool rests() const override {
    return resting;
  }
  void onBroken(const std::string& reason, std::vector<TaskPtr>&) noexcept override {
    brokenReason = reason;
    brokenSignal.release();
  }
  void put(Task::Kind kind, std::function<void()> body) {
    put(std::make_unique<FunctionTask>(kind, std::move(body)));
  }
  void put(std::unique_ptr<FunctionTask> task) {
    const std::lock_guard<std::mutex> lock(mutex);
    queue.push_back(std::move(task));
  }
  mutable std::mutex mutex;
  std::vector<std::unique_ptr<FunctionTask>> queue;
  int arrivals = 0; // of the token's holder
  std::atomic<bool> inside{false};
  std::atomic<int> turns{0};
  std::atomic<bool> broken{false};
  std::atomic<bool> resting{false};
  std::string brokenReason;
  std::binary_semaphore brokenSignal{0};
};

// For longer than a thread needs that does not wait.
void staysFalse(const std::atomic<bool>& flag) {
  for (int look = 0; look < 20; ++look) {
    CHECK_THAT(!flag);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

struct Running {
  explicit Running(int workers) {
    EngineOptions options;
    options.numWorkerThreads = workers;
    engine = std::make_shared<ThreadedEngine>(options, driver, bell);
    engine->start();
  }
  ~Running() {
    engine->stop(std::chrono::seconds(10));
  }
  void submit(Task::Kind kind, std::function<void()> body) {
    driver.put(kind, std::move(body));
    engine->submitted(false);
  }
  void request(std::function<void()> body) {
    submit(Task::Kind::kRequest, std::move(body));
  }
  void completion(std::function<void()> body) {
    submit(Task::Kind::kCompletion, std::move(body));
  }
  Driver driver;
  BellWord bell;
  std::shared_ptr<Engine> engine;
};

} // namespace

TEST(engine_runs_what_arrives) {
  Running running(4);
  std::latch done(100);
  for (int i = 0; i < 100; ++i) {
    running.request([&] { done.count_down(); });
  }
  done.wait();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_takes_requests_in_the_order_in_which_they_have_arrived) {
  constexpr int kThreads = 3;
  constexpr int kRequests = 5000; // of each
  Running running(1);
  std::vector<int> taken;
  std::latch done(kThreads * kRequests);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) { // each makes turns, and so does the leader
    threads.emplace_back([&] {
      for (int request = 0; request < kRequests; ++request) {
        running.driver.put(std::make_unique<FunctionTask>(Task::Kind::kRequest, [&](const FunctionTask& task) {
          taken.push_back(task.arrival);
          done.count_down();
        }));
        running.engine->submitted(false);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  done.wait();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
  CHECK_THAT(std::is_sorted(taken.begin(), taken.end()));
}

TEST(engine_that_gets_no_thread_says_why) {
  const NoThreads none;
  CHECK_THROWS(Running(4), "no thread can be started for the engine of RPC: this process has ");
}

TEST(engine_progresses_and_completes_while_all_workers_block) {
  Running running(3);
  std::latch blocked(3);
  std::binary_semaphore release{0};
  std::latch released(3);
  for (int i = 0; i < 3; ++i) {
    running.request([&] {
      blocked.count_down();
      release.acquire();
      release.release();
      released.count_down();
    });
  }
  blocked.wait();
  CHECK_EQUAL(running.engine->counts().runningRequests, 3);
  std::atomic<bool> fourth{false};
  std::binary_semaphore fourthRan{0};
  running.request([&] {
    fourth = true;
    fourthRan.release();
  });
  // Completions are not bounded by the workers, and the driver still turns.
  std::latch completed(5);
  for (int i = 0; i < 5; ++i) {
    running.completion([&] { completed.count_down(); });
  }
  completed.wait();
  const int turns = running.driver.turns;
  while (running.driver.turns == turns) {
    std::this_thread::yield();
  }
  CHECK_THAT(!fourth);
  release.release();
  released.wait();
  fourthRan.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_runs_long_requests_side_by_side) {
  Running running(8);
  std::latch all(8); // passes only if eight run at once
  for (int i = 0; i < 8; ++i) {
    running.request([&] { all.arrive_and_wait(); });
  }
  all.wait();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_runs_long_requests_of_one_batch_side_by_side_after_sleeping) {
  Running running(2);
  for (int round = 0; round < 20; ++round) {
    auto warm = std::make_shared<std::latch>(20); // so that threads exist and are parked
    for (int i = 0; i < 20; ++i) {
      running.completion([warm] { warm->count_down(); });
    }
    warm->wait();
    std::this_thread::sleep_for(std::chrono::milliseconds(4));
    // Shared: the tasks may still be inside it when this thread goes on.
    auto both = std::make_shared<std::latch>(2);
    running.driver.put(Task::Kind::kRequest, [both] { both->arrive_and_wait(); });
    running.request([both] { both->arrive_and_wait(); });
    both->wait();
  }
}

TEST(engine_runs_completions_that_block_each_other) {
  Running running(1);
  std::latch both(2);
  running.completion([&] { both.arrive_and_wait(); });
  running.completion([&] { both.arrive_and_wait(); });
  both.wait();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_runs_any_number_of_completions_that_wait_for_others) {
  constexpr int kTasks = 200;
  Running running(1);
  std::latch all(kTasks);
  for (int i = 0; i < kTasks; ++i) {
    running.completion([&] {
      auto inner = std::make_shared<std::binary_semaphore>(0);
      running.driver.put(Task::Kind::kCompletion, [inner] { inner->release(); });
      running.engine->submitted(/*expectsReply=*/true);
      inner->acquire();
      all.count_down();
    });
  }
  all.wait();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_a_task_may_submit_and_wait) {
  Running running(2);
  std::binary_semaphore done{0};
  running.request([&] {
    auto inner = std::make_shared<std::binary_semaphore>(0);
    running.driver.put(Task::Kind::kCompletion, [inner] { inner->release(); });
    running.engine->submitted(/*expectsReply=*/true);
    inner->acquire();
    done.release();
  });
  done.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_a_request_that_is_blocked_leaves_its_place_to_second_attempts_only) {
  Running running(1);
  std::binary_semaphore blocked{0}, ended{0};
  std::atomic<bool> ranMeanwhile{false};
  std::atomic<bool> wentOn{false};
  running.request([&] {
    {
      const ThreadedEngine::Blocked wait;
      blocked.acquire(); // what the second attempt makes
    }
    wentOn = true;
  });
  running.request([&] {
    ranMeanwhile = true;
    ended.release();
  });
  running.submit(Task::Kind::kSecondAttempt, [&] {
    CHECK_THAT(!ranMeanwhile);
    blocked.release();
    // With one place, what waited goes on when this has ended, not beside it.
    staysFalse(wentOn);
  });
  ended.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_a_request_that_is_blocked_for_a_value_leaves_its_place_to_creations_only) {
  Running running(1);
  std::binary_semaphore value{0}, ended{0};
  std::atomic<bool> wentOn{false};
  std::vector<int> order;
  running.request([&] {
    {
      const ThreadedEngine::Blocked wait(ThreadedEngine::Blocked::For::kValueOfThisProcess);
      value.acquire();
    }
    wentOn = true;
  });
  running.request([&] { order.push_back(2); });
  running.submit(Task::Kind::kCreation, [&] {
    order.push_back(1);
    value.release();
    staysFalse(wentOn);
  });
  running.request([&] {
    order.push_back(3);
    ended.release();
  });
  ended.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
  CHECK_THAT(order == (std::vector<int>{1, 2, 3}));
}

TEST(engine_creations_and_other_requests_have_their_turn_and_no_place_of_what_waits_for_an_answer) {
  Running running(1);
  std::binary_semaphore begun{0}, go{0}, ended{0};
  std::vector<int> order;
  running.request([&] {
    {
      const ThreadedEngine::Blocked wait;
      begun.release();
      go.acquire();
    }
    order.push_back(0);
  });
  begun.acquire();
  for (int i = 1; i <= 6; ++i) {
    running.submit(i % 2 != 0 ? Task::Kind::kCreation : Task::Kind::kRequest, [&, i] {
      order.push_back(i);
      if (i == 6) {
        ended.release();
      }
    });
  }
  while (running.engine->counts().queuedRequests < 6) {
    std::this_thread::yield();
  }
  CHECK_THAT(running.engine->queuedBefore([&](const Task& task) { return task.place == 6; }) == size_t{4});
  go.release();
  ended.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
  CHECK_THAT(order == (std::vector<int>{0, 1, 2, 3, 4, 5, 6}));
}

TEST(engine_a_second_attempt_runs_before_other_requests_and_none_beside_it) {
  Running running(1);
  std::binary_semaphore begun{0}, go{0}, ended{0};
  std::vector<int> order;
  running.request([&] {
    {
      const ThreadedEngine::Blocked wait;
    }
    begun.release();
    go.acquire();
    order.push_back(0);
  });
  begun.acquire();
  running.request([&] {
    order.push_back(2);
    ended.release();
  });
  running.submit(Task::Kind::kSecondAttempt, [&] { order.push_back(1); });
  while (running.engine->counts().queuedRequests < 2) { // the leader, which may have the token, hands them over
    std::this_thread::yield();
  }
  go.release();
  ended.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
  CHECK_THAT(order == (std::vector<int>{0, 1, 2}));
}

TEST(engine_a_guest_runs_the_completion_it_waits_for_and_nothing_else) {
  Running running(2);
  const int awaited = 0;
  for (int i = 0; i < 100; ++i) {
    Engine::announceGuest(true);
    std::atomic<bool> done{false};
    std::thread::id ranOn, otherRanOn;
    std::binary_semaphore other{0};
    {
      const std::lock_guard<std::mutex> lock(running.driver.mutex);
      running.driver.queue.push_back(std::make_unique<FunctionTask>(Task::Kind::kCompletion, [&] {
        otherRanOn = std::this_thread::get_id();
        other.release();
      }));
      auto mine = std::make_unique<FunctionTask>(Task::Kind::kCompletion, [&] {
        ranOn = std::this_thread::get_id();
        done = true;
      });
      mine->awaited = &awaited;
      running.driver.queue.push_back(std::move(mine));
    }
    while (!done) { // an engine's thread may have been faster
      running.engine->driveFor(&awaited, [&] { return done.load(); });
    }
    other.acquire();
    CHECK_THAT(otherRanOn != std::this_thread::get_id());
  }
  CHECK_THAT(!Engine::guestAnnounced());
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_leads_again_when_a_guest_gives_up) {
  Running running(2);
  const int awaited = 0;
  running.engine->driveFor(&awaited, [] { return false; }); // until the spin time has passed
  std::binary_semaphore done{0};
  running.request([&] { done.release(); });
  done.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_a_guest_leaves_however_much_there_is_to_do) {
  Running running(2);
  const int awaited = 0;
  std::atomic<bool> over{false};
  std::thread busy([&] { // a peer that always sends
    while (!over) {
      running.driver.put(Task::Kind::kCompletion, [] {});
    }
  });
  running.engine->driveFor(&awaited, [] { return false; });
  over = true;
  busy.join();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_runs_tasks_with_the_scheduling_policy_of_the_thread_that_started_it) {
  const int policy = sched_getscheduler(0);
  std::atomic<int> others{0};
  Running running(4);
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3)); // in which its threads probably wait
    const auto together = std::make_shared<std::latch>(5);
    for (int task = 0; task < 4; ++task) {
      running.request([policy, &others, together] {
        others += sched_getscheduler(0) != policy;
        std::thread([&] { others += sched_getscheduler(0) != policy; }).join();
        together->arrive_and_wait(); // so each has a thread of its own
      });
    }
    together->arrive_and_wait();
  }
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
  CHECK_EQUAL(others, 0);
}

TEST(engine_wakes_from_sleep) {
  Running running(2);
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5)); // long enough to fall asleep; nothing depends on it
    auto done = std::make_shared<std::binary_semaphore>(0);
    running.request([done] { done->release(); });
    done->acquire();
  }
}

TEST(engine_rests_while_the_driver_does_until_it_is_woken) {
  Driver driver;
  driver.resting = true;
  BellWord bell;
  EngineOptions options;
  options.idling.spinTime = std::chrono::nanoseconds(0);
  options.idling.maxSleep = std::chrono::microseconds(100);
  options.idling.maxRest = std::chrono::hours(1);
  auto engine = std::make_shared<ThreadedEngine>(options, driver, bell);
  engine->start();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  CHECK_THAT(driver.turns < 50); // each sleep is twice as long as the one before; 1000 of the shorter limit fit in
  std::binary_semaphore done{0};
  driver.put(Task::Kind::kRequest, [&] { done.release(); });
  engine->wake();
  done.acquire();
  CHECK_THAT(engine->stop(std::chrono::seconds(10)));
}

TEST(engine_stop_drops_what_is_queued_and_reports_what_runs) {
  Driver driver;
  BellWord bell;
  EngineOptions options;
  options.numWorkerThreads = 1;
  auto engine = std::make_shared<ThreadedEngine>(options, driver, bell);
  engine->start();
  std::binary_semaphore started{0};
  std::binary_semaphore release{0};
  std::binary_semaphore ended{0};
  std::atomic<bool> second{false};
  engine->post(std::make_unique<FunctionTask>(Task::Kind::kRequest, [&] {
    started.release();
    release.acquire();
    ended.release();
  }));
  engine->post(std::make_unique<FunctionTask>(Task::Kind::kRequest, [&] { second = true; }));
  started.acquire();
  CHECK_THAT(!engine->stop(std::chrono::milliseconds(20)));
  release.release();
  ended.acquire();
  CHECK_THAT(engine->stop(std::chrono::seconds(10)));
  CHECK_THAT(!second);
}

// The answer to a call is such a task: if it is lost, who waits for the call waits for ever.
TEST(engine_stop_drops_what_a_turn_yields_meanwhile) {
  struct Fate {
    std::atomic<bool> ran{false}, gone{false};
  };
  struct Probe final : Task {
    explicit Probe(std::shared_ptr<Fate> what) : fate(std::move(what)) {}
    ~Probe() override {
      fate->gone = true;
    }
    Kind kind() const override {
      return Kind::kRequest;
    }
    void run() noexcept override {
      fate->ran = true;
    }
    const std::shared_ptr<Fate> fate;
  };
  struct LateDriver final : Driver {
    bool turn(ProgressToken& token, std::vector<TaskPtr>& tasks) override {
      if (!armed.exchange(false)) {
        return Driver::turn(token, tasks);
      }
      inTurn.release();
      for (bool stopping = false; !stopping;) { // an engine that stops destroys what it is given, at once
        const auto fate = std::make_shared<Fate>();
        engine->post(std::make_unique<Probe>(fate));
        stopping = fate->gone && !fate->ran;
      }
      tasks.push_back(std::make_unique<Probe>(late));
      return true;
    }
    std::atomic<bool> armed{false};
    std::binary_semaphore inTurn{0};
    Engine* engine = nullptr;
    const std::shared_ptr<Fate> late = std::make_shared<Fate>();
  };
  LateDriver driver;
  BellWord bell;
  auto engine = std::make_shared<ThreadedEngine>(EngineOptions(), driver, bell);
  driver.engine = engine.get();
  driver.armed = true;
  engine->start();
  driver.inTurn.acquire();
  CHECK_THAT(engine->stop(std::chrono::seconds(10)));
  CHECK_THAT(driver.late->gone);
  CHECK_THAT(!driver.late->ran);
}

TEST(engine_a_broken_driver_is_reported_and_tasks_still_run) {
  Running running(2);
  running.driver.broken = true;
  running.driver.brokenSignal.acquire();
  CHECK_EQUAL(running.driver.brokenReason, "the wire is cut");
  std::binary_semaphore done{0};
  running.engine->post(std::make_unique<FunctionTask>(Task::Kind::kCompletion, [&] { done.release(); }));
  done.acquire();
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(engine_threads_that_wait_take_no_core_from_one_that_runs) {
  int possible = 0; // some systems refuse it, or this process has a policy of its own
  std::thread([&] {
    const sched_param none{};
    if (sched_getscheduler(0) == SCHED_OTHER) {
      (void)sched_setscheduler(0, SCHED_BATCH, &none);
    }
    possible = sched_getscheduler(0);
  }).join();
  Running running(1);
  std::promise<pid_t> thread;
  running.request([&] { thread.set_value(gettid()); });
  const pid_t ran = thread.get_future().get();
  while (sched_getscheduler(ran) != possible) { // until it waits
    std::this_thread::yield();
  }
  running.engine->stop(std::chrono::seconds(10)); // before what the tasks use goes out of scope
}

TEST(doorbell_a_ring_between_prepare_and_wait_is_not_lost) {
  BellWord word;
  Doorbell bell(word);
  const uint32_t ticket = bell.prepare();
  bell.ring();
  CHECK_THAT(bell.wait(ticket, std::chrono::hours(1)));
  const uint32_t next = bell.prepare();
  CHECK_THAT(!bell.wait(next, std::chrono::microseconds(100)));
}
