#include "device/lending.h"

#include <algorithm>
#include <bit>
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
  for (auto& [device, regions] : regions_) {
    const OnDevice onDevice(*runtime_, device);
    const RelaxedCapture relaxed(*runtime_);
    for (const Region& region : regions.all) {
      (void)runtime_->table().Free(region.memory);
    }
  }
}

bool Lender::lendsTo(int peer, c10::DeviceIndex here, c10::DeviceIndex there) {
  if (!neighbours_.at(peer)) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ways_.find({peer, here, there});
  if (found != ways_.end()) {
    return found->second == Way::kOpen;
  }
  const Regions& regions = regionsOf(here);
  ways_.emplace(Pair{peer, here, there}, regions.all.empty() ? Way::kClosed : Way::kOffered);
  if (!regions.all.empty()) {
    offers_.emplace_back(peer, LendingOffer{here, there, names_.at(here), regions.all.front().handle});
    hasOffers_ = true;
  }
  return false;
}

Lender::Regions& Lender::regionsOf(c10::DeviceIndex device) {
  const auto [found, isNew] = regions_.try_emplace(device);
  if (isNew) {
    addRegion(found->second, device, kSmallRegion, /*small=*/true);
  }
  return found->second;
}

void Lender::addRegion(Regions& regions, c10::DeviceIndex device, size_t bytes, bool small) {
  if (regions.full) {
    return;
  }
  Region region;
  region.small = small;
  const OnDevice onDevice(*runtime_, device);
  const RelaxedCapture relaxed(*runtime_);
  void* memory = nullptr;
  try {
    runtime_->check(runtime_->table().Malloc(&memory, bytes), "Malloc");
    runtime_->check(runtime_->table().IpcGetMemHandle(&region.handle, memory), "IpcGetMemHandle");
  } catch (const DeviceError&) {
    if (memory != nullptr) {
      (void)runtime_->table().Free(memory);
    }
    regions.full = true;
    return;
  }
  region.memory = static_cast<char*>(memory);
  region.bytes = bytes;
  regions.all.push_back(region);
}

size_t Lender::largestOf(const Regions& regions, bool small) {
  size_t bytes = 0;
  for (const Region& region : regions.all) {
    bytes = region.small == small && !region.retired ? std::max(bytes, region.bytes) : bytes;
  }
  return bytes;
}

// Four such pieces fit a region, so that the copies into some overlap with those out of others.
size_t Lender::pieceFor(c10::DeviceIndex device, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Regions& regions = regionsOf(device);
  if (largestOf(regions, /*small=*/true) == 0) {
    addRegion(regions, device, kSmallRegion, /*small=*/true);
  }
  const size_t small = largestOf(regions, /*small=*/true) == 0 ? 0 : std::min(bytes, kSmallPiece);
  if (bytes <= kSmallPiece) {
    return small;
  }
  const size_t wanted = std::min(std::bit_ceil(std::max(4 * bytes, 2 * kSmallRegion)), largest_);
  if (largestOf(regions, /*small=*/false) < wanted) {
    addRegion(regions, device, wanted, /*small=*/false);
  }
  return std::max(small, std::min(bytes, largestOf(regions, /*small=*/false) / 4));
}

std::optional<Lender::Lent> Lender::find(const Regions& regions, size_t bytes) {
  for (size_t number = 0; number < regions.all.size(); ++number) {
    const Region& region = regions.all[number];
    if (region.retired || region.small != (bytes <= kSmallPiece)) {
      continue;
    }
    const size_t units = (bytes + region.unit() - 1) / region.unit();
    size_t run = 0;
    for (size_t unit = 0; unit < kUnits; ++unit) {
      run = region.used[unit] ? 0 : run + 1;
      if (run == units) {
        return Lent{0, number, unit + 1 - units, units};
      }
    }
  }
  return std::nullopt;
}

std::optional<Lender::Lease> Lender::lend(int peer, c10::DeviceIndex device, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Regions& regions = regionsOf(device);
  size_t number = 0;
  while (number < kTickets && regions.tickets[(regions.nextTicket + number) % kTickets].units != 0) {
    ++number;
  }
  const auto place = number == kTickets ? std::nullopt : find(regions, std::max<size_t>(bytes, 1));
  if (!place) {
    return std::nullopt;
  }
  number = (regions.nextTicket + number) % kTickets;
  regions.nextTicket = number + 1;
  regions.tickets[number] = *place;
  regions.tickets[number].peer = peer;
  Region& region = regions.all[place->region];
  for (size_t unit = place->firstUnit; unit < place->firstUnit + place->units; ++unit) {
    region.used.set(unit);
  }
  const size_t offset = place->firstUnit * region.unit();
  return Lease{
      {device, static_cast<uint32_t>(number), static_cast<uint32_t>(place->region), 0, offset, bytes, region.handle},
      region.memory + offset};
}

void Lender::takeBack(int32_t device, uint32_t ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = regions_.find(static_cast<c10::DeviceIndex>(device));
  if (found == regions_.end() || ticket >= kTickets || found->second.tickets[ticket].units == 0) {
    return;
  }
  Lent& lent = found->second.tickets[ticket];
  Region& region = found->second.all[lent.region];
  for (size_t unit = lent.firstUnit; unit < lent.firstUnit + lent.units; ++unit) {
    region.used.reset(unit);
  }
  lent.units = 0;
}

void Lender::lose(int peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [device, regions] : regions_) {
    for (const Lent& lent : regions.tickets) {
      if (lent.units != 0 && lent.peer == peer) {
        regions.all[lent.region].retired = true;
      }
    }
  }
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
  if (found == ways_.end() || found->second != Way::kOffered) {
    return {};
  }
  found->second = verdict.accepted != 0 ? Way::kOpen : Way::kClosed;
  return {verdict.why.data(), strnlen(verdict.why.data(), verdict.why.size())};
}

std::map<int, std::string> Lender::ways() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<int, std::string> all;
  for (const auto& [pair, way] : ways_) {
    std::string& text = all[std::get<0>(pair)];
    text += c10::str(
        text.empty() ? "" : ", ", static_cast<int>(std::get<1>(pair)), "->", static_cast<int>(std::get<2>(pair)),
        way == Way::kOpen ? " ipc" : " pinned");
  }
  return all;
}

// ---- the borrower ----

Borrower::~Borrower() {
  if (inForkedChild()) {
    return;
  }
  for (const auto& [key, memory] : regions_) {
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
      regions_[{lender, offer.here, 0, reader}] = static_cast<char*>(memory);
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

const char* Borrower::open(const Loan& loan, c10::DeviceIndex device) {
  constexpr uint32_t kRegions = 32; // of a device, more than there can be
  const Ticket& ticket = loan.ticket();
  if (ticket.number >= kTickets || ticket.region >= kRegions) {
    throw std::out_of_range("it lends what it does not have");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!regions_.contains({loan.lender(), ticket.device, 0, device})) {
    throw std::out_of_range("it lends what it has not offered");
  }
  char*& region = regions_[{loan.lender(), ticket.device, ticket.region, device}];
  if (region == nullptr) {
    const RelaxedCapture relaxed(*runtime_);
    void* memory = nullptr;
    runtime_->check(runtime_->table().IpcOpenMemHandle(&memory, ticket.memory, kPeerAccess), "IpcOpenMemHandle");
    region = static_cast<char*>(memory);
  }
  return region + ticket.offset;
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
