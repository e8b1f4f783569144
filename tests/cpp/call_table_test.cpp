#include "agent/call_table.h"

#include <iterator>
#include <map>
#include <random>
#include <set>
#include <utility>

#include "allocations.h"
#include "check.h"

using namespace torch_rpc_mpi;

namespace {

PendingCall callTo(int peer, int timeout) { // milliseconds
  PendingCall call;
  call.future = c10::make_intrusive<c10::ivalue::Future>(at::AnyClassType::get());
  call.peer = peer;
  call.timeout = std::chrono::milliseconds(timeout);
  return call;
}

std::optional<PendingCall> takeExpired(CallTable& table, Clock::time_point now) {
  while (auto due = table.takeDue(now)) {
    if (due->expired) {
      return std::move(due->expired);
    }
  }
  return std::nullopt;
}

int takeAllExpired(CallTable& table, Clock::time_point now) {
  int taken = 0;
  while (takeExpired(table, now)) {
    ++taken;
  }
  return taken;
}

} // namespace

TEST(call_table_takes_each_call_once_and_late_ids_find_nothing) {
  CallTable table;
  const auto now = Clock::now();
  const uint64_t first = table.add(callTo(1, 0), now);
  CHECK_THAT(table.take(first, 1).has_value());
  CHECK_THAT(!table.take(first, 1).has_value());
  const uint64_t second = table.add(callTo(2, 0), now); // reuses the slot
  CHECK_THAT(!table.take(first, 1).has_value());
  CHECK_THAT(table.take(second, 2).has_value());
  CHECK_THAT(!table.take(12345, 1).has_value());
}

TEST(call_table_expires_in_order_of_deadlines) {
  CallTable table;
  const auto now = Clock::now();
  std::vector<uint64_t> ids;
  for (int i = 0; i < 100; ++i) {
    ids.push_back(table.add(callTo(i % 4, i % 20 == 0 ? 0 : i), now));
  }
  CHECK_THAT(table.nextDeadline() == now + std::chrono::milliseconds(1));
  CHECK_EQUAL(takeAllExpired(table, now), 0);
  CHECK_EQUAL(takeAllExpired(table, now + std::chrono::milliseconds(50)), 48);
  CHECK_THAT(table.nextDeadline() == now + std::chrono::milliseconds(51));
  table.close();
  for (int left = 52; left > 0; --left) {
    CHECK_THAT(table.takeAny().has_value());
  }
  CHECK_THAT(!table.takeAny().has_value());
  CHECK_EQUAL(table.size(), 0U);
  CHECK_EQUAL(table.add(callTo(0, 0), now), 0U);
  CHECK_EQUAL(table.size(), 0U);
  CHECK_EQUAL(takeAllExpired(table, now + std::chrono::hours(1)), 0);
  CHECK_THAT(table.nextDeadline() == Clock::time_point::max());
}

TEST(call_table_calls_to_a_lost_peer_expire_soon_with_the_first_reason_and_need_no_memory) {
  CallTable table;
  const auto now = Clock::now();
  const uint64_t id = table.add(callTo(1, 0), now);
  const uint64_t other = table.add(callTo(2, 0), now);
  for (int i = 0; i < 1000; ++i) {
    (void)table.add(callTo(1, i), now);
  }
  const auto first = std::make_shared<const std::string>("it crashed");
  const auto second = std::make_shared<const std::string>("it left");
  testing::failAllocations(1 << 20);
  CHECK_THAT(table.failLater(id, 1, first, now));
  CHECK_THAT(!table.failLater(other, 1, first, now)); // not to that peer
  table.failAllOf(1, second, now);
  testing::failAllocations(0);
  CHECK_THAT(!table.take(id, 1).has_value()); // its response would come too late
  int failed = 0;
  while (const auto call = takeExpired(table, now + kFailureDelay)) {
    CHECK_THAT(call->failure == (++failed == 1 ? first : second));
  }
  CHECK_EQUAL(failed, 1001);
  CHECK_THAT(table.take(other, 2).has_value());
}

TEST(call_table_no_call_has_the_id_that_means_closed) {
  CallTable table(UINT32_MAX); // slot 0 was used 2^32 - 1 times
  const uint64_t id = table.add(callTo(1, 0), Clock::now());
  CHECK_THAT(id != 0);
  CHECK_THAT(table.take(id, 1).has_value());
  CHECK_EQUAL(table.size(), 0U);
}

TEST(call_table_gives_a_call_to_its_peer_alone) {
  CallTable table;
  const uint64_t id = table.add(callTo(1, 0), Clock::now());
  CHECK_THAT(!table.take(id, 2).has_value());
  CHECK_THAT(table.awaitsOther(id, 2));
  CHECK_THAT(!table.awaitsOther(id, 1));
  CHECK_THAT(table.take(id, 1).has_value());
  CHECK_THAT(!table.awaitsOther(id, 2)); // it is over
}

TEST(call_table_a_call_is_late_once_and_then_expires_at_its_time) {
  CallTable table;
  const auto now = Clock::now();
  const auto after = [&](int milliseconds) { return now + std::chrono::milliseconds(milliseconds); };
  const uint64_t slow = table.add(callTo(1, 3000), now);
  const uint64_t fast = table.add(callTo(2, 600), now);
  const uint64_t answered = table.add(callTo(2, 600), now);
  CHECK_THAT(table.nextDeadline() == after(500));
  CHECK_THAT(!table.takeDue(after(499)));
  const auto late = table.takeDue(after(510)); // it is looked at too late, which moves no deadline
  CHECK_THAT(late && !late->expired && late->id == fast && late->peer == 2);
  CHECK_EQUAL(table.takeDue(after(510))->id, answered);
  CHECK_THAT(!table.takeDue(after(599)));
  CHECK_THAT(table.nextDeadline() == after(600));
  table.explain(fast, 1, nullptr); // of another peer: nothing
  table.explain(fast, 2, std::make_shared<const std::string>("why"));
  table.explain(999, 2, nullptr);
  CHECK_THAT(table.take(answered, 2).has_value());
  const auto over = table.takeDue(after(600));
  CHECK_THAT(over && over->expired && over->expired->id == fast && *over->expired->whyLate == "why");
  CHECK_EQUAL(over->expired->timeout.count(), 600);
  CHECK_EQUAL(table.takeDue(after(2500))->id, slow);
  CHECK_THAT(!table.takeDue(after(2999)));
  CHECK_THAT(table.takeDue(after(3000))->expired.has_value());
  CHECK_EQUAL(table.size(), 0U);
  CHECK_THAT(!table.takeDue(after(100000)));
}

TEST(call_table_calls_become_late_and_expire_in_the_order_of_their_ends_whatever_their_timeouts) {
  CallTable table;
  const auto now = Clock::now();
  for (const int timeout : {5000, 2000, 3000, 150, 120}) {
    (void)table.add(callTo(1, timeout), now);
  }
  std::vector<int64_t> ends;
  for (auto due = table.takeDue(now + std::chrono::hours(1)); due; due = table.takeDue(now + std::chrono::hours(1))) {
    if (due->expired) {
      ends.push_back(due->expired->timeout.count());
    }
  }
  CHECK_THAT((ends == std::vector<int64_t>{120, 150, 2000, 3000, 5000}));
}

TEST(call_table_what_is_answered_leaves_the_others_in_their_order) {
  CallTable table;
  std::mt19937 random(7);
  const auto now = Clock::now();
  std::set<std::pair<Clock::time_point, uint64_t>> expected; // when each expires
  std::map<uint64_t, Clock::time_point> ends;
  for (int i = 0; i < 3000; ++i) {
    if (ends.empty() || random() % 3 != 0) {
      const int timeout = 1 + static_cast<int>(random() % 99); // too short to be late first
      const uint64_t id = table.add(callTo(1, timeout), now);
      ends[id] = now + std::chrono::milliseconds(timeout);
      expected.emplace(ends[id], id);
    } else {
      const auto answered = std::next(ends.begin(), static_cast<ptrdiff_t>(random() % ends.size()));
      CHECK_THAT(table.take(answered->first, 1).has_value());
      expected.erase({answered->second, answered->first});
      ends.erase(answered);
    }
  }
  auto before = now;
  for (auto due = table.takeDue(now + std::chrono::hours(1)); due; due = table.takeDue(now + std::chrono::hours(1))) {
    CHECK_THAT(due->expired && ends.at(due->id) >= before);
    before = ends.at(due->id);
    expected.erase({before, due->id});
  }
  CHECK_THAT(expected.empty());
}
