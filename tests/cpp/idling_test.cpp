#include "engine/idling.h"

#include "check.h"

using namespace torch_rpc_mpi;
using Times = IdlingTimes;
using Pause = Idling::Pause;

namespace {

constexpr auto kTurn = std::chrono::microseconds(2);

// A leader that looks every two microseconds unless told otherwise.
struct Leader {
  explicit Leader(IdlingOptions options) : idling(options, work) {
    idling.begin(now);
  }
  Idling::Step look(bool found, std::chrono::nanoseconds after = kTurn, bool rests = false) {
    return idling.next(found, rests, now += after);
  }
  // How long it polls after the last thing that it found.
  std::chrono::nanoseconds polls() {
    (void)look(true);
    const auto begin = now;
    while (look(false).sleep.count() == 0) {
    }
    return now - begin;
  }
  std::atomic<uint64_t> work{5};
  Clock::time_point now{std::chrono::seconds(1)};
  Idling idling;
};

} // namespace

TEST(idling_polls_for_the_spin_time_then_sleeps_longer_and_longer) {
  Leader leader({.spinTime = std::chrono::microseconds(100), .maxSleep = std::chrono::microseconds(300)});
  CHECK_THAT(leader.look(true).pause == Pause::kNone);
  CHECK_THAT(leader.look(false).pause == Pause::kYield);
  CHECK_THAT(leader.polls() == std::chrono::microseconds(100));
  for (const int expected : {100, 200, 300, 300}) {
    CHECK_THAT(leader.look(false).sleep == std::chrono::microseconds(expected));
  }
  CHECK_THAT(leader.look(true).sleep.count() == 0); // polls again
  CHECK_THAT(leader.polls() == std::chrono::microseconds(100));
  CHECK_THAT(leader.look(false).sleep == 2 * Times::kFirstSleep);
}

TEST(idling_sleeps_longer_while_the_driver_rests) {
  Leader leader({.spinTime = std::chrono::nanoseconds(0)});
  Idling::Step step;
  for (int look = 0; look < 20; ++look) {
    step = leader.look(false, kTurn, /*rests=*/true);
  }
  CHECK_THAT(step.sleep == IdlingOptions().maxRest);
  CHECK_THAT(leader.look(false).sleep == IdlingOptions().maxSleep);
}

TEST(idling_naps_where_cores_are_scarce_and_others_get_much_done) {
  const auto us = [](int count) { return std::chrono::microseconds(count); };
  Leader leader({.scarce = true});
  const auto naps = [&](int after) { return leader.look(false, us(after)).pause == Pause::kNap; };
  CHECK_THAT(!naps(0));
  leader.work += 100; // long ago or just now: that shows when the window ends
  CHECK_THAT(!naps(50));
  CHECK_THAT(naps(50));
  leader.work += 2;
  CHECK_THAT(naps(99));
  CHECK_THAT(!naps(1));
  leader.work += 3;
  CHECK_THAT(naps(100));
  leader.work += 3;
  CHECK_THAT(!naps(200));

  Leader rich({.scarce = false});
  rich.work += 100;
  CHECK_THAT(rich.look(false, us(100)).pause == Pause::kYield);
}

TEST(idling_polls_briefly_for_a_while_after_others_had_the_core_of_a_crowded_host) {
  const auto afterAway = [](Leader& leader) {
    (void)leader.look(true);
    (void)leader.look(false, Times::kAway + kTurn);
    return leader.polls();
  };
  Leader crowded({.scarce = false, .crowded = true});
  CHECK_THAT(crowded.polls() == std::chrono::milliseconds(1));
  CHECK_THAT(afterAway(crowded) == Times::kBriefly);
  CHECK_THAT(crowded.polls() == Times::kBriefly);
  crowded.now += Times::kRemembered;
  CHECK_THAT(crowded.polls() == std::chrono::milliseconds(1));

  Leader napping({.scarce = false, .crowded = true});
  napping.now += Times::kAway + kTurn;
  napping.idling.napped(napping.now); // it was away because it wanted to
  CHECK_THAT(napping.polls() == std::chrono::milliseconds(1));

  Leader roomy({.scarce = false, .crowded = false});
  CHECK_THAT(afterAway(roomy) == std::chrono::milliseconds(1));
  Leader impatient({.spinTime = std::chrono::microseconds(10), .scarce = false, .crowded = true});
  CHECK_THAT(afterAway(impatient) == std::chrono::microseconds(10));
}
