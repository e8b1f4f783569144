#include "peer/due_peers.h"

#include <thread>

#include "check.h"

using namespace torch_rpc_mpi;

TEST(due_peers_are_taken_all_at_once_and_each_once) {
  DuePeers due;
  CHECK_THAT(!due.any());
  CHECK_THAT(due.take().credit.empty());
  due.tellCredit(3);
  due.refuse(2, "it makes no sense");
  due.tellCredit(1);
  CHECK_THAT(due.any());
  const DuePeers::Due taken = due.take();
  CHECK_THAT(taken.credit == (std::vector<int>{3, 1}));
  CHECK_EQUAL(taken.refused.size(), 1U);
  CHECK_EQUAL(taken.refused[0].first, 2);
  CHECK_EQUAL(taken.refused[0].second, "it makes no sense");
  CHECK_THAT(!due.any());
  CHECK_THAT(due.take().refused.empty());
}

// What comes while the other is taken is not left for an event that may never come: any() says so.
TEST(due_peers_of_other_threads_are_all_taken) {
  constexpr int kEach = 20000;
  DuePeers due;
  std::thread credits([&] {
    for (int i = 0; i < kEach; ++i) {
      due.tellCredit(i);
    }
  });
  std::thread refusals([&] {
    for (int i = 0; i < kEach; ++i) {
      due.refuse(i, "");
    }
  });
  int nextCredit = 0, nextRefusal = 0;
  while (nextCredit < kEach || nextRefusal < kEach) {
    const DuePeers::Due taken = due.take();
    for (const int rank : taken.credit) {
      CHECK_EQUAL(rank, nextCredit++);
    }
    for (const auto& [rank, why] : taken.refused) {
      CHECK_EQUAL(rank, nextRefusal++);
    }
  }
  credits.join();
  refusals.join();
  CHECK_THAT(!due.any());
}
