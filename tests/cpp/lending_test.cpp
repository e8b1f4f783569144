// Device memory that neighbours lend each other, over a runtime whose memory is the host's.
#include "device/lending.h"

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

bool opens = true;
int waits = 0;

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
    *memory = std::malloc(bytes);
    return 0;
  };
  table.Free = [](void* memory) {
    std::free(memory);
    return 0;
  };
  table.StreamWaitEvent = [](void*, void*, unsigned) {
    ++waits;
    return 0;
  };
  table.EventCreateWithFlags = [](void** event, unsigned flags) {
    *event = new unsigned(flags);
    return 0;
  };
  table.EventDestroy = [](void* event) {
    delete static_cast<unsigned*>(event);
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
  table.IpcGetEventHandle = [](IpcHandle* handle, void* event) {
    *handle = handleOf(static_cast<unsigned*>(event));
    return 0;
  };
  table.IpcOpenEventHandle = [](void** event, IpcHandle handle) {
    *event = new unsigned(*pointerIn<unsigned>(handle));
    return 0;
  };
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
    waits = 0;
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
  Lender lender{fake, kNames, {false, true, false}};
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
  CHECK_THAT(two.lender.ways().at(1).find("0->0 pinned (the device first of the sender") == 0);
  Two apart;
  CHECK_EQUAL(apart.meet(2, 0).accepted, 0U);
  CHECK_THAT(apart.warning.find("devices 0 and 2 cannot access each other's memory") == 0);
}

TEST(what_is_lent_is_read_behind_its_event_and_comes_back) {
  Two two;
  two.meet();
  const auto lease = two.lender.lend(0, 6);
  CHECK_EQUAL(lease->ticket.bytes, 6U);
  CHECK_EQUAL(*static_cast<unsigned*>(lease->event), 6U); // interprocess, without timing
  std::memcpy(lease->memory, "bytes", 6);
  {
    const Borrower::Loan loan(two.borrower, 0, lease->ticket);
    CHECK_EQUAL(std::string(two.borrower->open(loan, 0, nullptr)), "bytes");
    CHECK_EQUAL(waits, 1);
    CHECK_THAT(!two.borrower->hasReturns());
  }
  CHECK_THAT(two.borrower->hasReturns());
  CHECK_EQUAL(two.borrower->takeReturns(/*all=*/false).size(), 0U); // it waits for others
  const auto returns = two.borrower->takeReturns(/*all=*/true);
  CHECK_EQUAL(returns.at(0).size(), 1U);
  CHECK_EQUAL(returns.at(0)[0].ticket, lease->ticket.number);
}

TEST(large_pieces_leave_room_for_small_ones_and_all_are_lent_again) {
  Two two;
  two.meet();
  for (int round = 0; round < 3; ++round) {
    std::vector<Lender::Lease> leases;
    while (auto lease = two.lender.lend(0, kLentAtOnce)) {
      leases.push_back(*lease);
    }
    CHECK_EQUAL(leases.size(), 3U);
    CHECK_THAT(!two.lender.lend(0, kLentAtOnce));
    while (auto lease = two.lender.lend(0, 1000)) {
      leases.push_back(*lease);
    }
    CHECK_EQUAL(leases.size(), kTickets);
    std::vector<std::pair<size_t, size_t>> ranges;
    for (const auto& lease : leases) {
      ranges.emplace_back(lease.ticket.offset, lease.ticket.offset + lease.ticket.bytes);
    }
    std::ranges::sort(ranges);
    for (size_t i = 1; i < ranges.size(); ++i) {
      CHECK_THAT(ranges[i - 1].second <= ranges[i].first);
    }
    CHECK_THAT(ranges.back().second <= kRegionBytes);
    for (const auto& lease : leases) {
      two.lender.takeBack(lease.ticket.device, lease.ticket.number);
    }
  }
}

TEST(tickets_that_make_no_sense_are_refused) {
  Two two;
  two.meet();
  for (const Ticket& ticket :
       {Ticket{0, kTickets, 0, 1, {}}, Ticket{0, 0, kRegionBytes, 1, {}}, Ticket{1, 0, 0, 1, {}}}) {
    const Borrower::Loan loan(two.borrower, 0, ticket);
    CHECK_THROWS(two.borrower->open(loan, 0, nullptr), "");
    CHECK_EQUAL(waits, 0);
  }
  two.lender.takeBack(0, 1000);
  two.lender.takeBack(7, 0);
  two.lender.takeBack(0, 3); // not lent
}
