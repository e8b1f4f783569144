// What this process lends of its devices' memory: see Note [Lent memory].
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bitset>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device/lending.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards all that changes.
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
  // Returns what to tell the user, the first time that the way is closed to a peer, or nothing. It may be closed after
  // it was open, when the peer could not open one more region.
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

} // namespace torch_rpc_mpi
