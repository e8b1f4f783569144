// Device memory that neighbours lend each other, over a runtime whose memory is the host's.
#include "device/borrower.h"
#include "device/lender.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "check.h"

using namespace torch_rpc_mpi;

namespace {

constexpr auto kType = c10::kPrivateUse1;
C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<c10::kPrivateUse1>)

constexpr size_t kLargest = size_t{256} << 20;

bool opens = true;
bool isFull = false; // the device

template <typename T>
IpcHandle handleOf(T* pointer) {
  IpcHandle handle{};
  std::memcpy(handle.reserved, &pointer, sizeof(pointer));
  return handle;
}

template <typename T>
T* pointerIn(const IpcHandle& handle) {
  T* pointer = nullptr;
  std::memcpy(&pointer, handle.reserved, sizeof(pointer));
  return pointer;
}

std::shared_ptr<const DeviceRuntime> runtime() {
  RuntimeTable table;
  table.Malloc = [](void** memory, size_t bytes) {
    *memory = isFull ? nullptr : std::malloc(bytes);
    return isFull ? 2 : 0;
  };
  table.Free = [](void* memory) {
    std::free(memory);
    return 0;
  };
  table.IpcGetMemHandle = [](IpcHandle* handle, void* memory) {
    *handle = handleOf(static_cast<char*>(memory));
    return 0;
  };
  table.IpcOpenMemHandle = [](void** memory, IpcHandle handle, unsigned) {
    *memory = pointerIn<char>(handle);
    return opens ? 0 : 201;
  };
  table.IpcCloseMemHandle = [](void*) { return 0; };
  table.DeviceCanAccessPeer = [](int* can, int, int peer) {
    *can = peer == 2 ? 0 : 1;
    return 0;
  };
  table.ThreadExchangeStreamCaptureMode = [](int*) { return 0; };
  table.GetErrorString = [](int) { return "invalid device context"; };
  table.GetLastError = [] { return 0; };
  return std::make_shared<const DeviceRuntime>(kType, table, "fake");
}

DeviceName named(const char* text) {
  DeviceName name{};
  std::copy_n(text, std::strlen(text), name.begin());
  return name;
}

const std::vector<DeviceName> kNames{named("first"), named("second"), named("third")};

// Rank 0 lends to rank 1; rank 2 is of another host.
struct Two {
  Two() {
    opens = true;
    isFull = false;
  }
  LendingVerdict meet(int here = 0, int there = 0) {
    CHECK_THAT(!lender.lendsTo(1, static_cast<c10::DeviceIndex>(here), static_cast<c10::DeviceIndex>(there)));
    const auto offers = lender.takeOffers();
    CHECK_EQUAL(offers.size(), 1U);
    CHECK_EQUAL(offers[0].first, 1);
    const LendingVerdict verdict = borrower->onOffer(0, offers[0].second);
    warning = lender.onVerdict(1, verdict);
    return verdict;
  }
  std::shared_ptr<const DeviceRuntime> fake = runtime();
  Lender lender{fake, kNames, {false, true, false, true}, kLargest};
  std::shared_ptr<Borrower> borrower = std::make_shared<Borrower>(fake, kNames);
  std::string warning;
};

} // namespace

TEST(lending_begins_with_an_offer_that_the_neighbour_can_open) {
  Two two;
  CHECK_EQUAL(two.meet().accepted, 1U);
  CHECK_THAT(two.lender.lendsTo(1, 0, 0));
  CHECK_EQUAL(two.warning, "");
  CHECK_THAT(!two.lender.lendsTo(2, 0, 0)); // another host's
  CHECK_THAT(!two.lender.hasOffers());
}

TEST(lending_ends_with_a_refusal_that_says_what_would_help) {
  Two two;
  opens = false;
  CHECK_EQUAL(two.meet().accepted, 0U);
  CHECK_THAT(!two.lender.lendsTo(1, 0, 0));
  CHECK_THAT(two.warning.find("IpcOpenMemHandle: invalid device context (201). In containers") == 0);
  CHECK_THAT(!two.lender.hasOffers());
}

TEST(a_device_that_the_neighbour_does_not_see_or_reach_is_refused) {
  Two two;
  two.borrower = std::make_shared<Borrower>(two.fake, std::vector<DeviceName>{named("second")});
  CHECK_EQUAL(two.meet().accepted, 0U);
  CHECK_THAT(two.warning.find("the device first of the sender is not visible to the receiver") == 0);
  CHECK_THAT(two.lender.ways("pinned").at(1).find("0->0 pinned (the device first of the sender") == 0);
  Two apart;
  CHECK_EQUAL(apart.meet(2, 0).accepted, 0U);
  CHECK_THAT(apart.warning.find("devices 0 and 2 cannot access each other's memory") == 0);
}

TEST(what_is_lent_is_read_and_comes_back) {
  Two two;
  two.meet();
  for (const size_t bytes : {size_t{6}, size_t{20} << 20}) { // of two regions, of which only the first was offered
    CHECK_EQUAL(two.lender.pieceFor(0, bytes), bytes);
    const auto lease = two.lender.lend(1, 0, bytes);
    CHECK_EQUAL(lease->ticket.bytes, bytes);
    std::memcpy(lease->memory, "bytes", 6);
    {
      const Borrower::Loan loan(two.borrower, 0, lease->ticket);
      CHECK_EQUAL(std::string(two.borrower->open(loan, 0)), "bytes");
      CHECK_THAT(!two.borrower->hasReturns());
    }
    CHECK_THAT(two.borrower->hasReturns());
    if (bytes < 100) {
      CHECK_EQUAL(two.borrower->takeReturns(/*all=*/false).size(), 0U); // it waits for others
    }
    const auto returns = two.borrower->takeReturns(/*all=*/true);
    CHECK_EQUAL(returns.at(0).size(), 1U);
    CHECK_EQUAL(returns.at(0)[0].ticket, lease->ticket.number);
  }
}

TEST(a_further_region_that_cannot_be_opened_closes_the_way) {
  Two two;
  two.meet();
  constexpr size_t kBytes = size_t{20} << 20;
  CHECK_EQUAL(two.lender.pieceFor(0, kBytes), kBytes);
  const auto lease = two.lender.lend(1, 0, kBytes);
  const auto other = two.lender.lend(1, 0, kBytes);
  opens = false;
  for (const auto& each : {lease, other}) {
    const Borrower::Loan loan(two.borrower, 0, each->ticket);
    CHECK_THROWS(two.borrower->open(loan, 0), "IpcOpenMemHandle: invalid device context (201)");
  }
  CHECK_THAT(two.borrower->hasReturns());
  const auto refusals = two.borrower->takeRefusals();
  CHECK_EQUAL(refusals.size(), 2U);
  CHECK_EQUAL(refusals[0].first, 0);
  CHECK_THAT(two.lender.lendsTo(1, 0, 0)); // it does not know yet
  const std::string warning = two.lender.onVerdict(1, refusals[0].second);
  CHECK_THAT(warning.find("one more region of 128 MiB could not be opened: IpcOpenMemHandle") == 0);
  CHECK_EQUAL(two.lender.onVerdict(1, refusals[1].second), ""); // once
  CHECK_THAT(!two.lender.lendsTo(1, 0, 0));
  CHECK_THAT(!two.lender.hasOffers());
  CHECK_THAT(two.borrower->takeRefusals().empty());
  const auto returns = two.borrower->takeReturns(/*all=*/false); // which do not wait
  CHECK_EQUAL(returns.at(0).size(), 2U);
  for (const LendingReturn& back : returns.at(0)) {
    two.lender.takeBack(1, back);
  }
  two.borrower->close(); // nothing that was not opened is closed: the fake would free it
}

TEST(pieces_are_as_large_as_what_is_sent_while_there_is_memory) {
  Two two;
  two.meet();
  CHECK_EQUAL(two.lender.pieceFor(0, size_t{64} << 20), size_t{64} << 20);
  CHECK_EQUAL(two.lender.pieceFor(0, size_t{1} << 30), kLargest / 4);
  Two small;
  small.meet();
  isFull = true;
  CHECK_EQUAL(small.lender.pieceFor(0, size_t{64} << 20), kSmallPiece); // of what it has
  CHECK_EQUAL(small.lender.pieceFor(1, 5), 0U);
}

TEST(all_that_is_lent_is_apart_and_is_lent_again) {
  Two two;
  two.meet();
  const size_t piece = two.lender.pieceFor(0, size_t{40} << 20);
  for (int round = 0; round < 3; ++round) {
    std::vector<Lender::Lease> leases;
    while (auto lease = two.lender.lend(1, 0, piece)) {
      leases.push_back(*lease);
    }
    CHECK_THAT(leases.size() >= 4);
    while (auto lease = two.lender.lend(1, 0, 100'000)) { // there is room for small ones all the same
      leases.push_back(*lease);
    }
    CHECK_EQUAL(leases.size(), kTickets);
    std::vector<std::pair<char*, char*>> ranges;
    for (const auto& lease : leases) {
      ranges.emplace_back(lease.memory, lease.memory + lease.ticket.bytes);
    }
    std::ranges::sort(ranges);
    for (size_t i = 1; i < ranges.size(); ++i) {
      CHECK_THAT(ranges[i - 1].second <= ranges[i].first);
    }
    for (const auto& lease : leases) {
      two.lender.takeBack(1, {lease.ticket.device, lease.ticket.number, lease.ticket.region, 0});
    }
  }
}

TEST(what_a_peer_has_that_ended_is_not_lent_again_and_others_get_room_elsewhere) {
  Two two;
  two.meet();
  for (const size_t bytes : {size_t{100}, size_t{40} << 20}) {
    two.lender.pieceFor(0, bytes);
    const auto lost = two.lender.lend(2, 0, bytes);
    two.lender.lose(2);
    CHECK_EQUAL(two.lender.pieceFor(0, bytes), bytes);
    const auto other = two.lender.lend(1, 0, bytes);
    CHECK_THAT(other->ticket.region != lost->ticket.region);
    const Borrower::Loan loan(two.borrower, 0, other->ticket);
    CHECK_EQUAL(static_cast<const void*>(two.borrower->open(loan, 0)), static_cast<const void*>(other->memory));
  }
}

TEST(tickets_that_make_no_sense_are_refused) {
  Two two;
  two.meet();
  for (const Ticket& ticket : {Ticket{0, kTickets, 0, 0, 0, 1, {}}, Ticket{1, 0, 0, 0, 0, 1, {}}}) {
    const Borrower::Loan loan(two.borrower, 0, ticket);
    CHECK_THROWS(two.borrower->open(loan, 0), "it lends what it");
  }
  const auto lease = two.lender.lend(1, 0, 10);
  for (const LendingReturn& back :
       {LendingReturn{0, 1000, 0, 0}, LendingReturn{7, 0, 0, 0}, LendingReturn{256, lease->ticket.number, 0, 0},
        LendingReturn{0, lease->ticket.number + 1, 0, 0}}) {
    const auto giveBack = [&] { two.lender.takeBack(1, back); };
    CHECK_THROWS((giveBack(), 0), "it ");
  }
  const auto byAnother = [&] { two.lender.takeBack(2, {0, lease->ticket.number, 0, 0}); };
  CHECK_THROWS((byAnother(), 0), "it gives back what was not lent to it");
  two.lender.takeBack(1, {0, LendingReturn::kClosed, 77, 0}); // freed long since
}

TEST(a_region_is_freed_when_its_readers_have_closed_it_and_not_before) {
  Two two;
  two.meet();
  const size_t bytes = size_t{40} << 20;
  two.lender.pieceFor(0, bytes);
  const auto lease = two.lender.lend(1, 0, bytes);
  const auto receive = [&](const Lender::Lease& lent) {
    const Borrower::Loan loan(two.borrower, 0, lent.ticket);
    (void)two.borrower->open(loan, 0);
  };
  const auto answer = [&] {
    for (const auto& [lender, returns] : two.borrower->takeReturns(/*all=*/true)) {
      for (const LendingReturn& back : returns) {
        two.lender.takeBack(1, back);
      }
    }
    two.lender.freeUnused();
  };
  receive(*lease);
  two.borrower->closeUnused(Clock::now() - std::chrono::hours(1)); // it was used since
  answer();
  CHECK_THAT(two.lender.keepsMore() && two.borrower->keepsMore());

  const auto onItsWay = two.lender.lend(1, 0, bytes);
  two.borrower->closeUnused(Clock::time_point::max());
  answer();
  CHECK_THAT(two.lender.keepsMore()); // for the ticket that will come
  receive(*onItsWay);
  two.lender.withdraw(two.lender.lend(1, 0, bytes)->ticket); // one that never comes
  two.borrower->closeUnused(Clock::time_point::max());
  answer();
  CHECK_THAT(!two.lender.keepsMore() && !two.borrower->keepsMore());
  CHECK_EQUAL(two.lender.pieceFor(0, bytes), bytes);
  receive(*two.lender.lend(1, 0, bytes));
}

TEST(a_peer_that_gives_nothing_back_leaves_room_for_others) {
  Two two;
  two.meet();
  const size_t bytes = kLargest / 4;
  two.lender.pieceFor(0, bytes);
  (void)two.lender.lendsTo(3, 0, 0); // another neighbour
  while (two.lender.lend(1, 0, bytes)) {
  }
  const auto other = two.lender.lend(2, 0, bytes);
  CHECK_THAT(other.has_value());
  two.lender.takeBack(2, {0, other->ticket.number, other->ticket.region, 0});
  CHECK_THAT(two.lender.lend(2, 0, bytes).has_value());
}

TEST(many_at_once_get_more_regions_up_to_a_limit) {
  Two two;
  two.meet();
  const size_t bytes = size_t{8} << 20;
  two.lender.pieceFor(0, bytes);
  std::vector<Lender::Lease> leases;
  while (auto lease = two.lender.lend(1, 0, bytes)) {
    leases.push_back(*lease);
  }
  CHECK_THAT(leases.size() * bytes > kLargest && leases.size() * bytes <= 2 * kLargest);
}
