#include "device/borrower.h"

#include <algorithm>
#include <new>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "host/fork_guard.h"

namespace torch_rpc_mpi {

namespace {

constexpr unsigned kPeerAccess = 1; // IpcMemLazyEnablePeerAccess
// Returns that wait for more, so that small calls cost no message each; those of large pieces do not.
constexpr size_t kReturnsTogether = 16;
constexpr size_t kReturnAtOnce = size_t{1} << 20; // bytes

LendingVerdict refusal(int32_t here, int32_t there, const std::string& why) {
  LendingVerdict verdict{here, there, 0, {}};
  std::copy_n(why.begin(), std::min(why.size(), verdict.why.size() - 1), verdict.why.begin());
  return verdict;
}

} // namespace

Borrower::~Borrower() {
  if (!inForkedChild()) {
    try {
      close();
    } catch (const std::exception&) { // the device is broken, or the process ends
    }
  }
}

void Borrower::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [key, memory] : std::exchange(regions_, {})) {
    const OnDevice onDevice(*runtime_, std::get<3>(key));
    (void)runtime_->table().IpcCloseMemHandle(memory);
  }
}

std::string Borrower::whyNot(const LendingOffer& offer) const {
  const auto lenders = std::ranges::find(names_, offer.device);
  if (offer.device[0] == '\0' || lenders == names_.end()) {
    return c10::str(
        "the device ", offer.device.data(),
        " of the sender is not visible to the receiver. Let each rank see all "
        "devices of its host (no --gpus-per-task or CUDA_VISIBLE_DEVICES for each rank; choose by "
        "torch.cuda.set_device "
        "and device maps)");
  }
  const auto device = static_cast<int>(lenders - names_.begin());
  int can = 1;
  if (device != offer.there) {
    runtime_->check(runtime_->table().DeviceCanAccessPeer(&can, offer.there, device), "DeviceCanAccessPeer");
  }
  return can != 0 ? "" : c10::str("devices ", offer.there, " and ", device, " cannot access each other's memory");
}

LendingVerdict Borrower::onOffer(int lender, const LendingOffer& offer) {
  std::string why;
  try {
    const c10::DeviceIndex reader = indexOf(offer.there);
    const OnDevice onDevice(*runtime_, reader);
    const RelaxedCapture relaxed(*runtime_);
    why = whyNot(offer);
    if (why.empty()) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (regions_.contains({lender, offer.here, 0, reader})) {
          throw std::out_of_range("it offers the same memory twice");
        }
      }
      void* memory = nullptr;
      runtime_->check(runtime_->table().IpcOpenMemHandle(&memory, offer.memory, kPeerAccess), "IpcOpenMemHandle");
      const std::lock_guard<std::mutex> lock(mutex_);
      regions_[{lender, offer.here, 0, reader}] = static_cast<char*>(memory);
      return {offer.here, offer.there, 1, {}};
    }
  } catch (const DeviceError& error) {
    why = c10::str(
        error.what(),
        ". In containers, memory is shared between processes of one IPC and PID namespace (docker run "
        "--ipc=host --pid=host)");
  } catch (const c10::Error& error) { // of torch's guard
    why = error.what_without_backtrace();
  }
  return refusal(offer.here, offer.there, why);
}

void Borrower::received(int lender, const Ticket& ticket) {
  if (ticket.region != 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Use& use = uses_[{lender, ticket.device, ticket.region}];
    ++use.received;
    ++use.loans;
    use.open = true;
  }
}

bool Borrower::keepsMore() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::ranges::any_of(uses_, [](const auto& each) { return each.second.open; });
}

// Under the lock: what is closed must not be opened meanwhile.
void Borrower::closeUnused(Clock::time_point since) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [key, use] : uses_) {
    if (!use.open || use.loans > 0 || use.last >= since) {
      continue;
    }
    const auto [lender, device, number] = key;
    for (auto region = regions_.begin(); region != regions_.end();) {
      const auto& [itsLender, itsDevice, itsNumber, reader] = region->first;
      if (itsLender != lender || itsDevice != device || itsNumber != number) {
        ++region;
        continue;
      }
      const OnDevice onDevice(*runtime_, reader);
      const RelaxedCapture relaxed(*runtime_);
      (void)runtime_->table().IpcCloseMemHandle(region->second);
      region = regions_.erase(region);
    }
    use.open = false;
    returns_[lender].push_back({device, LendingReturn::kClosed, number, use.received});
    hasReturns_ = true;
  }
}

const char* Borrower::open(const Loan& loan, c10::DeviceIndex device) {
  const Ticket& ticket = loan.ticket();
  const uint64_t size = ticket.regionUnits * uint64_t{kSizeUnit};
  if (ticket.number >= kTickets || ticket.offset > size || ticket.bytes > size - ticket.offset) {
    throw std::out_of_range("it lends what it does not have");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!regions_.contains({loan.lender(), ticket.device, 0, device})) {
    throw std::out_of_range("it lends what it has not offered");
  }
  const std::tuple key{loan.lender(), ticket.device, ticket.region, device};
  const auto known = regions_.find(key);
  if (known != regions_.end()) {
    return known->second + ticket.offset;
  }
  const RelaxedCapture relaxed(*runtime_);
  void* memory = nullptr;
  try {
    runtime_->check(runtime_->table().IpcOpenMemHandle(&memory, ticket.memory, kPeerAccess), "IpcOpenMemHandle");
  } catch (const DeviceError& error) {
    refusals_.emplace_back(
        loan.lender(),
        refusal(
            ticket.device, device,
            c10::str("one more region of ", ticket.regionUnits, " MiB could not be opened: ", error.what())));
    throw;
  }
  return (regions_[key] = static_cast<char*>(memory)) + ticket.offset;
}

std::vector<std::pair<int, LendingVerdict>> Borrower::takeRefusals() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(refusals_, {});
}

void Borrower::giveBack(int lender, const Ticket& ticket) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (ticket.region != 0) {
      Use& use = uses_[{lender, ticket.device, ticket.region}];
      --use.loans;
      use.last = Clock::now();
    }
    returns_[lender].push_back({ticket.device, ticket.number, ticket.region, 0});
    urgent_ = urgent_ || !refusals_.empty() || ticket.bytes >= kReturnAtOnce || ++waiting_ >= kReturnsTogether;
    hasReturns_ = true;
  } catch (const std::bad_alloc&) { // then it is lost
  }
}

std::map<int, std::vector<LendingReturn>> Borrower::takeReturns(bool all) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!urgent_ && !all) {
    return {};
  }
  urgent_ = false;
  waiting_ = 0;
  hasReturns_ = false;
  return std::exchange(returns_, {});
}

} // namespace torch_rpc_mpi
