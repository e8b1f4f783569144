#include "agent/call_table.h"

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
  CHECK_THAT(table.takeExpired(now).empty());
  CHECK_EQUAL(table.takeExpired(now + std::chrono::milliseconds(50)).size(), 48U);
  CHECK_THAT(table.nextDeadline() == now + std::chrono::milliseconds(51));
  CHECK_EQUAL(table.takeAllOf(0).size() + table.takeAllOf(1).size(), 27U);
  table.close();
  CHECK_EQUAL(table.size(), 0U);
  CHECK_EQUAL(table.add(callTo(0, 0), now), 0U);
  CHECK_EQUAL(table.size(), 0U);
  CHECK_THAT(table.takeExpired(now + std::chrono::hours(1)).empty());
  CHECK_THAT(table.nextDeadline() == Clock::time_point::max());
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
