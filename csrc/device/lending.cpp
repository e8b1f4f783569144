#include "device/lending.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include <c10/util/StringUtil.h>

#include "host/fork_guard.h"

namespace torch_rpc_mpi {

namespace {

constexpr unsigned kPeerAccess = 1; // IpcMemLazyEnablePeerAccess
// Returns that wait for more, so that small calls cost no message each; those of large pieces do not.
constexpr size_t kReturnsTogether = 16;
constexpr size_t kReturnAtOnce = size_t{1} << 20; // bytes

} // namespace

// ---- the lender ----

Lender::~Lender() {
  if (inForkedChild()) {
    return;
  }
  for (auto& [device, region] : regions_) {
    if (region == nullptr) {
      continue;
    }
    const OnDevice onDevice(*runtime_, device);
    const RelaxedCapture relaxed(*runtime_);
    for (const Lent& ticket : region->tickets) {
      if (ticket.event != nullptr) {
        runtime_->destroyEvent(ticket.event);
      }
    }
    (void)runtime_->table().Free(region->memory);
  }
}

bool Lender::lendsTo(int peer, c10::DeviceIndex here, c10::DeviceIndex there) {
  if (!neighbours_.at(peer)) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ways_.find({peer, here, there});
  if (found != ways_.end()) {
    return found->second.state == Way::kOpen;
  }
  const Region* const region = regionOf(here);
  ways_.emplace(Pair{peer, here, there}, region == nullptr ? Way{Way::kClosed, noRegion_} : Way{Way::kOffered, {}});
  if (region != nullptr) {
    LendingOffer offer{here, there, names_.at(here), region->handle};
    offers_.emplace_back(peer, offer);
    hasOffers_ = true;
  }
  return false;
}

Lender::Region* Lender::regionOf(c10::DeviceIndex device) {
  const auto found = regions_.find(device);
  if (found != regions_.end()) {
    return found->second.get();
  }
  auto region = std::make_unique<Region>();
  const OnDevice onDevice(*runtime_, device);
  const RelaxedCapture relaxed(*runtime_);
  void* memory = nullptr;
  try {
    runtime_->check(runtime_->table().Malloc(&memory, kRegionBytes), "Malloc");
    runtime_->check(runtime_->table().IpcGetMemHandle(&region->handle, memory), "IpcGetMemHandle");
    region->memory = static_cast<char*>(memory);
  } catch (const DeviceError& error) {
    noRegion_ = error.what();
    if (memory != nullptr) {
      (void)runtime_->table().Free(memory);
    }
    region = nullptr;
  }
  return regions_.emplace(device, std::move(region)).first->second.get();
}

// Small pieces are taken from the end, so that large ones stay whole.
std::optional<size_t> Lender::findUnits(const Region& region, size_t units) const {
  const bool small = units * kUnit <= kSmall;
  size_t run = 0;
  for (size_t i = 0; i < (small ? kUnits : kUnitsOfLarge); ++i) {
    const size_t unit = small ? kUnits - 1 - i : i;
    run = region.used[unit] ? 0 : run + 1;
    if (run == units) {
      return small ? unit : unit + 1 - units;
    }
  }
  return std::nullopt;
}

std::optional<Lender::Lease> Lender::lend(c10::DeviceIndex device, size_t bytes) {
  const size_t units = (std::max<size_t>(bytes, 1) + kUnit - 1) / kUnit;
  const std::lock_guard<std::mutex> lock(mutex_);
  Region* const region = regionOf(device);
  if (region == nullptr) {
    return std::nullopt;
  }
  size_t number = 0;
  for (; number < kTickets && region->tickets[(region->nextTicket + number) % kTickets].units != 0; ++number) {
  }
  const auto first = number < kTickets ? findUnits(*region, units) : std::nullopt;
  if (!first) {
    return std::nullopt;
  }
  number = (region->nextTicket + number) % kTickets;
  Lent& lent = region->tickets[number];
  if (lent.event == nullptr) {
    const OnDevice onDevice(*runtime_, device);
    const RelaxedCapture relaxed(*runtime_);
    lent.event = runtime_->createEvent(/*interprocess=*/true);
    runtime_->check(runtime_->table().IpcGetEventHandle(&lent.handle, lent.event), "IpcGetEventHandle");
  }
  region->nextTicket = number + 1;
  lent.firstUnit = *first;
  lent.units = units;
  for (size_t unit = *first; unit < *first + units; ++unit) {
    region->used.set(unit);
  }
  const size_t offset = *first * kUnit;
  return Lease{
      {device, static_cast<uint32_t>(number), offset, bytes, lent.handle}, region->memory + offset, lent.event};
}

void Lender::takeBack(int32_t device, uint32_t ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = regions_.find(static_cast<c10::DeviceIndex>(device));
  if (found == regions_.end() || found->second == nullptr || ticket >= kTickets) {
    return;
  }
  Region& region = *found->second;
  Lent& lent = region.tickets[ticket];
  for (size_t unit = lent.firstUnit; unit < lent.firstUnit + lent.units; ++unit) {
    region.used.reset(unit);
  }
  lent.units = 0;
}

std::vector<std::pair<int, LendingOffer>> Lender::takeOffers() {
  const std::lock_guard<std::mutex> lock(mutex_);
  hasOffers_ = false;
  return std::exchange(offers_, {});
}

std::string Lender::onVerdict(int peer, const LendingVerdict& verdict) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Pair pair{peer, static_cast<c10::DeviceIndex>(verdict.here), static_cast<c10::DeviceIndex>(verdict.there)};
  const auto found = ways_.find(pair);
  if (found == ways_.end() || found->second.state != Way::kOffered) {
    return {};
  }
  std::string why(verdict.why.data(), strnlen(verdict.why.data(), verdict.why.size()));
  found->second = {verdict.accepted != 0 ? Way::kOpen : Way::kClosed, why};
  return why;
}

std::map<int, std::string> Lender::ways() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<int, std::string> all;
  for (const auto& [pair, way] : ways_) {
    std::string& text = all[std::get<0>(pair)];
    text += c10::str(
        text.empty() ? "" : ", ", static_cast<int>(std::get<1>(pair)), "->", static_cast<int>(std::get<2>(pair)),
        way.state == Way::kOpen ? " ipc" : " pinned");
    if (way.state != Way::kOpen) {
      text += way.state == Way::kOffered ? " (ipc is offered)" : c10::str(" (", way.why, ")");
    }
  }
  return all;
}

// ---- the borrower ----

Borrower::~Borrower() {
  if (inForkedChild()) {
    return;
  }
  for (const auto& [key, event] : events_) {
    runtime_->destroyEvent(event);
  }
  for (const auto& [key, memory] : regions_) {
    const OnDevice onDevice(*runtime_, std::get<2>(key));
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
  LendingVerdict verdict{offer.here, offer.there, 0, {}};
  std::string why;
  try {
    const auto reader = static_cast<c10::DeviceIndex>(offer.there);
    const OnDevice onDevice(*runtime_, reader);
    const RelaxedCapture relaxed(*runtime_);
    why = whyNot(offer);
    if (why.empty()) {
      void* memory = nullptr;
      runtime_->check(runtime_->table().IpcOpenMemHandle(&memory, offer.memory, kPeerAccess), "IpcOpenMemHandle");
      const std::lock_guard<std::mutex> lock(mutex_);
      regions_[{lender, offer.here, reader}] = static_cast<char*>(memory);
      verdict.accepted = 1;
    }
  } catch (const DeviceError& error) {
    why = c10::str(
        error.what(),
        ". In containers, memory is shared between processes of one IPC and PID namespace (docker run "
        "--ipc=host --pid=host)");
  }
  std::copy_n(why.begin(), std::min(why.size(), verdict.why.size() - 1), verdict.why.begin());
  return verdict;
}

const char* Borrower::open(const Loan& loan, c10::DeviceIndex device, void* stream) {
  const Ticket& ticket = loan.ticket();
  if (ticket.number >= kTickets || ticket.offset > kRegionBytes || ticket.bytes > kRegionBytes - ticket.offset) {
    throw std::out_of_range("it lends what it does not have");
  }
  char* memory = nullptr;
  void* event = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    memory = regions_.at({loan.lender(), ticket.device, device});
    void*& known = events_[{loan.lender(), ticket.device, ticket.number}];
    if (known == nullptr) {
      const RelaxedCapture relaxed(*runtime_);
      runtime_->check(runtime_->table().IpcOpenEventHandle(&known, ticket.event), "IpcOpenEventHandle");
    }
    event = known;
  }
  runtime_->waitFor(stream, event);
  return memory + ticket.offset;
}

void Borrower::giveBack(int lender, const Ticket& ticket) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    returns_[lender].push_back({ticket.device, ticket.number});
    urgent_ = urgent_ || ticket.bytes >= kReturnAtOnce || ++waiting_ >= kReturnsTogether;
    hasReturns_ = true;
  } catch (const std::bad_alloc&) { // then it is lost
  }
}

std::map<int, std::vector<Borrower::Return>> Borrower::takeReturns(bool all) {
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
