// A rank that waits for the others' agreement, without an agent: the test is the token's holder.
#include "agent/join.h"

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"

using namespace torch_rpc_mpi;

namespace {

struct Ranks {
  explicit Ranks(int size) : hold(tokens) {
    for (int rank = 0; rank < size; ++rank) {
      joins.push_back(std::make_unique<Join>(rank, size, [this, rank](ProgressToken&, int peer, std::string body) {
        frames.emplace_back(rank, peer, std::move(body));
      }));
    }
  }
  void advanceAll() {
    for (auto& join : joins) {
      join->advance(*hold, [] { return true; }, [] { return DrainCounts{}; });
    }
    for (const auto& [from, to, body] : std::exchange(frames, {})) {
      CHECK_EQUAL(joins[to]->onFrame(*hold, from, {body.data(), body.size()}), "");
    }
  }
  // What becomes of a join of that rank while all go on for a while.
  Join::Result join(int rank, int turns, bool last = true) {
    return joins[rank]->wait(SignalService(), 0.001F, last, [&] {
      for (int turn = 0; turn < turns; ++turn) {
        advanceAll();
      }
    });
  }
  TokenSource tokens;
  TokenHold hold;
  std::vector<std::unique_ptr<Join>> joins;
  std::vector<std::tuple<int, int, std::string>> frames;
};

constexpr int kEnough = 20; // turns

} // namespace

TEST(join_agrees_alone) {
  Ranks ranks(1);
  CHECK_THAT(ranks.join(0, kEnough) == Join::Result::kAgreed);
}

TEST(join_needs_everybody) {
  Ranks ranks(2);
  CHECK_THAT(ranks.join(0, kEnough) == Join::Result::kTimedOut);
  CHECK_THAT(ranks.join(1, kEnough) == Join::Result::kTimedOut); // rank 0 waits no longer
}

TEST(join_does_not_take_the_agreement_of_a_wait_that_is_over) {
  Ranks ranks(1);
  CHECK_THAT(ranks.join(0, 0, /*last=*/false) == Join::Result::kTimedOut); // nobody saw that it waited …
  ranks.advanceAll();                                                      // … or saw only that it does no longer
  CHECK_THAT(ranks.join(0, 0, /*last=*/false) == Join::Result::kTimedOut);
  CHECK_THAT(ranks.join(0, kEnough, /*last=*/false) == Join::Result::kAgreed);
  CHECK_THAT(ranks.join(0, 0, /*last=*/false) == Join::Result::kTimedOut);
}

// Rank 1 has reported, gives up, and the others, who cannot know, agree and leave.
TEST(join_fails_where_the_others_left_by_an_earlier_agreement) {
  Ranks ranks(2);
  const auto turns = [&](int count) {
    for (int turn = 0; turn < count; ++turn) {
      ranks.advanceAll();
    }
  };
  const auto wait = [&](int rank, const std::function<void()>& meanwhile) {
    return ranks.joins[rank]->wait(SignalService(), 0.001F, /*last=*/true, meanwhile);
  };
  const auto first = wait(0, [&] {
    const auto second = wait(1, [&] { turns(3); }); // a wave, and the report of the next
    CHECK_THAT(second == Join::Result::kTimedOut);
    turns(kEnough);
  });
  CHECK_THAT(first == Join::Result::kAgreed);
  CHECK_THAT(wait(1, [&] { turns(kEnough); }) == Join::Result::kFailed);
  CHECK_THAT(ranks.joins[1]->failure().find("have left") != std::string::npos);
}

// The others agree while a signal's handler runs, which then raises.
TEST(join_that_a_signal_ends_does_not_lose_an_agreement) {
  static Ranks* current = nullptr;
  Ranks ranks(1);
  current = &ranks;
  const SignalService interrupting{
      [] { return true; },
      [] {
        for (int turn = 0; turn < kEnough; ++turn) {
          current->advanceAll();
        }
        throw std::runtime_error("interrupted");
      }};
  CHECK_THROWS((void)ranks.joins[0]->wait(interrupting, 0, /*last=*/true, [] {}), "interrupted");
  CHECK_THAT(ranks.join(0, 0) == Join::Result::kFailed);
  CHECK_THAT(ranks.joins[0]->failure().find("have left") != std::string::npos);
}

TEST(join_knows_of_a_failure_before_it_begins) {
  Ranks ranks(2);
  ranks.joins[0]->fail("worker1 is gone");
  ranks.joins[0]->fail("and another");
  CHECK_THAT(ranks.join(0, 1) == Join::Result::kFailed);
  CHECK_EQUAL(ranks.joins[0]->failure(), "worker1 is gone");
}
