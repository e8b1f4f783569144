// Device memory that processes of one host share.
//
// Note [Lent memory]
// ~~~~~~~~~~~~~~~~~~
// A sender keeps regions of device memory, allocated when they are first needed, into which it copies what it sends to
// a neighbour; the neighbour copies it out from there. Only this memory is ever exported, not that of torch's tensors:
// handles name whole allocations, torch's may lie in segments that have none, and an open handle keeps the memory. A
// piece is lent with a ticket, which is sent when the copy into the piece is complete, as the sender's host has asked.
// (An event of the sender's for which the receiver's stream waits would spare that. But two processes take turns on a
// GPU, and one whose stream waits for the other seems to keep it from its turn. On an H200 a turn takes 137 us,
// whatever is in it, so that large tensors go in few large pieces.) The borrower gives the ticket back when its own
// copy is done, which it learns in the same way; a ticket that nobody has read is given back as well. What a peer had
// that has failed is not lent again. A pair of devices begins with an offer, which the peer tries to open. Until it
// has, and if it cannot, tensors go through pinned memory.
// A region that nothing was read from for some seconds is closed by those that have opened it, and freed by its lender
// when all have; but not the first.
#pragma once

#include <algorithm>
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

#include "base/clock.h"
#include "device/runtime.h"

namespace torch_rpc_mpi {

constexpr size_t kSmallPiece = size_t{4} << 20;   // bytes; larger ones have regions of their own
constexpr size_t kSmallRegion = size_t{32} << 20; // bytes
constexpr size_t kTickets = 128;                  // at once
constexpr size_t kSizeUnit = size_t{1} << 20;     // of regions

// In a message. `device` is the lender's.
struct Ticket {
  int32_t device = 0;
  uint32_t number = 0;
  uint32_t region = 0;      // of the device; the first was offered
  uint32_t regionUnits = 0; // its size, in kSizeUnit
  uint64_t offset = 0;      // in the region
  uint64_t bytes = 0;
  IpcHandle memory{}; // the region's
};

// A ticket that comes back; or a region that has been closed, by one to whom so many tickets of it had come.
struct LendingReturn {
  static constexpr uint32_t kClosed = UINT32_MAX; // instead of a ticket
  int32_t device = 0;
  uint32_t ticket = 0;
  uint32_t region = 0;
  uint32_t received = 0;
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
  // largest: bytes of the largest region of a device. All that it lends of one is twice that at most, besides small
  // pieces.
  Lender(
      std::shared_ptr<const DeviceRuntime> runtime,
      std::vector<DeviceName> names,
      std::vector<bool> neighbours,
      size_t largest)
      : runtime_(std::move(runtime)),
        names_(std::move(names)),
        neighbours_(std::move(neighbours)),
        largest_(largest) {}
  ~Lender();
  Lender(const Lender&) = delete;
  Lender& operator=(const Lender&) = delete;

  // Whether tensors can go this way. The first question makes an offer.
  bool lendsTo(int peer, c10::DeviceIndex here, c10::DeviceIndex there);
  // How large the pieces are in which so many bytes are lent: all in one, if they are no more than there is memory for.
  // Of that size there is always one, sooner or later.
  size_t pieceFor(c10::DeviceIndex device, size_t bytes);
  // A piece, and where it is; nothing if there is none free, or if the peer has more than is left for others.
  struct Lease {
    Ticket ticket;
    char* memory;
  };
  std::optional<Lease> lend(int peer, c10::DeviceIndex device, size_t bytes);
  // Throws std::out_of_range for what the peer does not have.
  void takeBack(int peer, const LendingReturn& back);
  // One that was not sent.
  void withdraw(const Ticket& ticket);
  // Frees the regions that all have closed. It may wait for the devices.
  void freeUnused();
  bool keepsMore() const; // than the first regions
  void close();           // frees all, and lends no more
  // The peer has ended with what it has: nothing is lent any more from the regions in which that lies.
  void lose(int peer);

  bool hasOffers() const {
    return hasOffers_.load(std::memory_order_relaxed);
  }
  std::vector<std::pair<int, LendingOffer>> takeOffers(); // by peer
  // Returns what to tell the user, the first time that the way is closed to a peer, or nothing.
  std::string onVerdict(int peer, const LendingVerdict& verdict);
  // For people: by peers' ranks, which way is taken, and why it is not the short one but `otherwise`.
  std::map<int, std::string> ways(const std::string& otherwise) const;

 private:
  static constexpr size_t kUnits = 512; // of a region

  struct Region {
    char* memory = nullptr;
    size_t bytes = 0;
    IpcHandle handle{};
    uint32_t id = 0;
    bool small = false;   // for small pieces
    bool retired = false; // a peer has ended with a piece of it
    std::bitset<kUnits> used;
    struct Reader {
      uint32_t sent = 0;  // tickets
      bool closed = true; // since
    };
    std::map<int, Reader> readers; // by peer
    size_t unit() const {
      return bytes / kUnits;
    }
  };
  struct Lent {
    int peer = 0;
    uint32_t region = 0;
    size_t firstUnit = 0, units = 0; // 0 units: not lent
  };
  struct Regions {           // of a device
    std::vector<Region> all; // the first was offered; none: there cannot be any
    uint32_t nextId = 0;
    Region& byId(uint32_t id) {
      return *std::ranges::find(all, id, &Region::id);
    }
    std::string whyFull; // empty: there may be memory for more
    std::array<Lent, kTickets> tickets;
    size_t nextTicket = 0;
  };
  struct Way {
    enum { kOffered, kOpen, kClosed } state = kOffered;
    std::string why; // closed; empty: not known
  };
  using Pair = std::tuple<int, c10::DeviceIndex, c10::DeviceIndex>; // peer, here, there

  Regions& regionsOf(c10::DeviceIndex device);
  void addRegion(Regions& regions, c10::DeviceIndex device, size_t bytes, bool small);
  static size_t largestOf(const Regions& regions, bool small); // bytes of a region
  bool grow(Regions& regions, c10::DeviceIndex device, size_t bytes);
  std::optional<Lent> find(const Regions& regions, int peer, size_t bytes) const;
  bool hasEnough(const Regions& regions, const Region& region, int peer) const;
  static Region& endLoan(Regions& regions, Lent& lent);

  const std::shared_ptr<const DeviceRuntime> runtime_;
  const std::vector<DeviceName> names_;
  const std::vector<bool> neighbours_;
  const size_t largest_;

  mutable std::mutex mutex_;
  std::map<c10::DeviceIndex, Regions> regions_;
  std::map<Pair, Way> ways_;
  std::vector<std::pair<int, LendingOffer>> offers_;
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
          ticket_(ticket) {
      borrower_->received(lender_, ticket_);
    }
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
  // Returns where the piece is, for a device of this process, which is the current one. Throws DeviceError;
  // std::out_of_range for a ticket that makes no sense.
  const char* open(const Loan& loan, c10::DeviceIndex device);

  // Closes the regions that nothing was read from since. It may wait for the devices.
  void closeUnused(Clock::time_point since);
  bool keepsMore() const; // open than what was offered
  void close();

  bool hasReturns() const {
    return hasReturns_.load(std::memory_order_relaxed);
  }
  // By lender; those that may still wait, for others to go with them, only if it is time.
  std::map<int, std::vector<LendingReturn>> takeReturns(bool all);

 private:
  struct Use {
    uint32_t received = 0; // tickets
    uint32_t loans = 0;    // of them, those that have not gone back
    Clock::time_point last;
    bool open = false; // or may be, for all that the lender knows
  };
  void received(int lender, const Ticket& ticket);
  void giveBack(int lender, const Ticket& ticket) noexcept;
  std::string whyNot(const LendingOffer& offer) const;

  const std::shared_ptr<const DeviceRuntime> runtime_;
  const std::vector<DeviceName> names_;

  mutable std::mutex mutex_;
  // By lender, its device and region, and the device of this process that reads. The first region has been offered.
  std::map<std::tuple<int, int32_t, uint32_t, c10::DeviceIndex>, char*> regions_;
  std::map<std::tuple<int, int32_t, uint32_t>, Use> uses_; // by lender, its device and region, but for the first
  std::map<int, std::vector<LendingReturn>> returns_;
  bool urgent_ = false;
  size_t waiting_ = 0; // returns
  std::atomic<bool> hasReturns_{false};
};

} // namespace torch_rpc_mpi
