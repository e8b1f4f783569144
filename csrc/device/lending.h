// Device memory that processes of one host share.
//
// Note [Lent memory]
// ~~~~~~~~~~~~~~~~~~
// A sender keeps a region of device memory for each of its devices, allocated at first use, into which it copies what
// it sends to a neighbour; the neighbour copies it out from there. Only this memory is ever exported, not that of
// torch's tensors: handles name whole allocations, torch's may lie in segments that have none, and an open handle keeps
// the memory. A piece of the region is lent with a ticket, of which each has an event: it is recorded behind the copy
// into the piece, and the borrower's stream waits for it. So the message that names the ticket is sent at once, and no
// host waits for a device. The borrower gives the ticket back when its own copy is done, which it learns by asking for
// an event; a ticket that nobody has read is given back as well. What a peer had that has failed is not lent again. A
// pair of devices begins with an offer, which the peer tries to open. Until it has, and if it cannot, tensors go
// through pinned memory.
#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "device/runtime.h"

namespace torch_rpc_mpi {

constexpr size_t kRegionBytes = size_t{32} << 20;
constexpr size_t kTickets = 64;
constexpr size_t kLentAtOnce = size_t{8} << 20; // bytes, at most, with a ticket

// In a message. `device` is the lender's.
struct Ticket {
  int32_t device = 0;
  uint32_t number = 0;
  uint64_t offset = 0; // in the region
  uint64_t bytes = 0;
  IpcHandle event{};
};

using DeviceName = std::array<char, 64>; // its UUID as text, the rest zeros

// What a lender tells a neighbour before the first ticket, from its device to one of theirs …
struct LendingOffer {
  int32_t here = 0, there = 0;
  DeviceName device{};
  IpcHandle memory{};
};
// … and what that says of it.
struct LendingVerdict {
  int32_t here = 0, there = 0; // of the offer
  uint32_t accepted = 0;
  std::array<char, 500> why{}; // not, ends with a zero
};

// As the lender. Thread-safe: mutex_ guards all that changes.
class Lender {
 public:
  // names: of all devices that this process sees. neighbours: by rank, who shares this host's devices.
  Lender(std::shared_ptr<const DeviceRuntime> runtime, std::vector<DeviceName> names, std::vector<bool> neighbours)
      : runtime_(std::move(runtime)),
        names_(std::move(names)),
        neighbours_(std::move(neighbours)) {}
  ~Lender();
  Lender(const Lender&) = delete;
  Lender& operator=(const Lender&) = delete;

  // Whether tensors can go this way. The first question makes an offer.
  bool lendsTo(int peer, c10::DeviceIndex here, c10::DeviceIndex there);
  // A piece of the region, and where it is; nothing if there is none free. The event is to be recorded behind the copy.
  struct Lease {
    Ticket ticket;
    char* memory;
    void* event;
  };
  std::optional<Lease> lend(c10::DeviceIndex device, size_t bytes);
  void takeBack(int32_t device, uint32_t ticket);

  bool hasOffers() const {
    return hasOffers_.load(std::memory_order_relaxed);
  }
  std::vector<std::pair<int, LendingOffer>> takeOffers(); // by peer
  // Returns what to tell the user, the first time that the way is closed to a peer, or nothing.
  std::string onVerdict(int peer, const LendingVerdict& verdict);
  // For people: by peers' ranks, which way is taken, and why it is not the short one.
  std::map<int, std::string> ways() const;

 private:
  static constexpr size_t kUnit = size_t{64} << 10;
  static constexpr size_t kUnits = kRegionBytes / kUnit;
  // Large pieces leave room for small ones.
  static constexpr size_t kSmall = size_t{1} << 20;
  static constexpr size_t kUnitsOfLarge = kUnits - 2 * (kSmall / kUnit);

  struct Lent {
    void* event = nullptr; // made at first use
    IpcHandle handle{};
    size_t firstUnit = 0, units = 0; // 0: not lent
  };
  struct Region {
    char* memory = nullptr;
    IpcHandle handle{};
    std::bitset<kUnits> used;
    std::array<Lent, kTickets> tickets;
    size_t nextTicket = 0;
  };
  struct Way {
    enum { kOffered, kOpen, kClosed } state = kOffered;
    std::string why; // closed; empty: not known
  };
  using Pair = std::tuple<int, c10::DeviceIndex, c10::DeviceIndex>; // peer, here, there

  Region* regionOf(c10::DeviceIndex device); // null: there is no memory for it, or it cannot be exported
  std::optional<size_t> findUnits(const Region& region, size_t units) const;

  const std::shared_ptr<const DeviceRuntime> runtime_;
  const std::vector<DeviceName> names_;
  const std::vector<bool> neighbours_;

  mutable std::mutex mutex_;
  std::map<c10::DeviceIndex, std::unique_ptr<Region>> regions_; // null: there cannot be one
  std::map<Pair, Way> ways_;
  std::vector<std::pair<int, LendingOffer>> offers_;
  std::string noRegion_; // why
  std::atomic<bool> hasOffers_{false};
};

// As the borrower. Thread-safe: mutex_ guards all that changes.
class Borrower : public std::enable_shared_from_this<Borrower> {
 public:
  Borrower(std::shared_ptr<const DeviceRuntime> runtime, std::vector<DeviceName> names)
      : runtime_(std::move(runtime)),
        names_(std::move(names)) {}
  ~Borrower();
  Borrower(const Borrower&) = delete;
  Borrower& operator=(const Borrower&) = delete;

  LendingVerdict onOffer(int lender, const LendingOffer& offer);

  // A ticket that a message has brought: it goes back when this is destroyed.
  class Loan {
   public:
    Loan(std::shared_ptr<Borrower> borrower, int lender, const Ticket& ticket)
        : borrower_(std::move(borrower)),
          lender_(lender),
          ticket_(ticket) {}
    ~Loan() {
      borrower_->giveBack(lender_, ticket_);
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;

    const Ticket& ticket() const {
      return ticket_;
    }
    int lender() const {
      return lender_;
    }

   private:
    const std::shared_ptr<Borrower> borrower_;
    const int lender_;
    const Ticket ticket_;
  };
  // The stream goes on behind the lender's copy. Returns where the piece is. Throws DeviceError; std::out_of_range for
  // a ticket of memory that was not offered.
  const char* open(const Loan& loan, c10::DeviceIndex device, void* stream);

  struct Return {
    int32_t device = 0;
    uint32_t ticket = 0;
  };
  bool hasReturns() const {
    return hasReturns_.load(std::memory_order_relaxed);
  }
  // By lender; those that may still wait, for others to go with them, only if it is time.
  std::map<int, std::vector<Return>> takeReturns(bool all);

 private:
  void giveBack(int lender, const Ticket& ticket) noexcept;
  std::string whyNot(const LendingOffer& offer) const;

  const std::shared_ptr<const DeviceRuntime> runtime_;
  const std::vector<DeviceName> names_;

  mutable std::mutex mutex_;
  // By lender, its device, and the one of this process that reads.
  std::map<std::tuple<int, int32_t, c10::DeviceIndex>, char*> regions_;
  std::map<std::tuple<int, int32_t, uint32_t>, void*> events_; // by lender, its device, and ticket
  std::map<int, std::vector<Return>> returns_;
  bool urgent_ = false;
  size_t waiting_ = 0; // returns
  std::atomic<bool> hasReturns_{false};
};

} // namespace torch_rpc_mpi
