// What this process has borrowed of its neighbours' devices: see Note [Lent memory].
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "device/lending.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards all that changes.
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
  // Returns where the piece is, for a device of this process, which is the current one. Throws std::out_of_range for a
  // ticket that makes no sense; DeviceError if its region cannot be opened, of which the lender has to be told then.
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
  // By lender, on regions that could not be opened. With the returns of their pieces, which do not wait.
  std::vector<std::pair<int, LendingVerdict>> takeRefusals();

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
  std::vector<std::pair<int, LendingVerdict>> refusals_;
  bool urgent_ = false;
  size_t waiting_ = 0; // returns
  std::atomic<bool> hasReturns_{false};
};

} // namespace torch_rpc_mpi
