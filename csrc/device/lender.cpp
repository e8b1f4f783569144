#include "device/lender.h"

#include <bit>
#include <cstring>

#include <c10/util/Logging.h>
#include <c10/util/StringUtil.h>

#include "host/fork_guard.h"

namespace torch_rpc_mpi {

Lender::~Lender() {
  if (!inForkedChild()) {
    try {
      close();
    } catch (const std::exception&) { // the device is broken, or the process ends
    }
  }
}

void Lender::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [pair, way] : ways_) {
    way = {Way::kClosed, "RPC was shut down"};
  }
  for (auto& [device, regions] : std::exchange(regions_, {})) {
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
    return found->second.state == Way::kOpen;
  }
  const Regions& regions = regionsOf(here);
  const bool any = !regions.all.empty();
  ways_.emplace(Pair{peer, here, there}, any ? Way{Way::kOffered, {}} : Way{Way::kClosed, regions.whyFull});
  if (any) {
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
  if (!regions.whyFull.empty()) {
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
  } catch (const DeviceError& error) {
    if (memory != nullptr) {
      (void)runtime_->table().Free(memory);
    }
    regions.whyFull = error.what();
    LOG(WARNING) << "RPC has no more than " << regions.all.size() << " regions of device " << static_cast<int>(device)
                 << "'s memory to share with other processes, because of one more of " << bytes
                 << " bytes: " << error.what() << ". Larger tensors may go through pinned memory of the host";
    return;
  }
  region.memory = static_cast<char*>(memory);
  region.bytes = bytes;
  region.id = regions.nextId++;
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

// So that one that takes nothing, because it is stopped, leaves room for others, if there are any.
bool Lender::hasEnough(const Regions& regions, const Region& region, int peer) const {
  if (std::ranges::all_of(ways_, [&](const auto& way) { return std::get<0>(way.first) == peer; })) {
    return false;
  }
  size_t has = 0;
  for (const Lent& lent : regions.tickets) {
    has += lent.region == region.id && lent.peer == peer ? lent.units : 0;
  }
  return has > kUnits - region.used.count();
}

std::optional<Lender::Lent> Lender::find(const Regions& regions, int peer, size_t bytes) const {
  for (const Region& region : regions.all) {
    if (region.retired || region.small != (bytes <= kSmallPiece) || hasEnough(regions, region, peer)) {
      continue;
    }
    const size_t units = (bytes + region.unit() - 1) / region.unit();
    size_t run = 0;
    for (size_t unit = 0; unit < kUnits; ++unit) {
      run = region.used[unit] ? 0 : run + 1;
      if (run == units) {
        return Lent{0, region.id, unit + 1 - units, units};
      }
    }
  }
  return std::nullopt;
}

// For many tensors at once: all pieces that there are have been lent.
bool Lender::grow(Regions& regions, c10::DeviceIndex device, size_t bytes) {
  size_t all = 0;
  for (const Region& region : regions.all) {
    all += region.small ? 0 : region.bytes;
  }
  const size_t more = std::min(std::max(std::bit_ceil(4 * bytes), 2 * largestOf(regions, /*small=*/false)), largest_);
  if (all + more > 2 * largest_) {
    return false;
  }
  const size_t before = regions.all.size();
  addRegion(regions, device, more, /*small=*/false);
  return regions.all.size() > before;
}

std::optional<Lender::Lease> Lender::lend(int peer, c10::DeviceIndex device, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Regions& regions = regionsOf(device);
  size_t number = 0;
  while (number < kTickets && regions.tickets[(regions.nextTicket + number) % kTickets].units != 0) {
    ++number;
  }
  if (number == kTickets) {
    return std::nullopt;
  }
  bytes = std::max<size_t>(bytes, 1);
  auto place = find(regions, peer, bytes);
  if (!place && bytes > kSmallPiece && grow(regions, device, bytes)) {
    place = find(regions, peer, bytes);
  }
  if (!place) {
    return std::nullopt;
  }
  number = (regions.nextTicket + number) % kTickets;
  regions.nextTicket = number + 1;
  regions.tickets[number] = *place;
  regions.tickets[number].peer = peer;
  Region& region = regions.byId(place->region);
  ++region.readers[peer].sent;
  region.readers[peer].closed = false;
  for (size_t unit = place->firstUnit; unit < place->firstUnit + place->units; ++unit) {
    region.used.set(unit);
  }
  const size_t offset = place->firstUnit * region.unit();
  return Lease{
      {device, static_cast<uint32_t>(number), place->region, static_cast<uint32_t>(region.bytes / kSizeUnit), offset,
       bytes, region.handle},
      region.memory + offset};
}

Lender::Region& Lender::endLoan(Regions& regions, Lent& lent) {
  Region& region = regions.byId(lent.region);
  for (size_t unit = lent.firstUnit; unit < lent.firstUnit + lent.units; ++unit) {
    region.used.reset(unit);
  }
  lent.units = 0;
  return region;
}

void Lender::takeBack(int peer, const LendingReturn& back) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = regions_.find(indexOf(back.device));
  if (found == regions_.end()) {
    throw std::out_of_range("it gives back what was not lent");
  }
  Regions& regions = found->second;
  if (back.ticket != LendingReturn::kClosed) {
    if (back.ticket >= kTickets || regions.tickets[back.ticket].units == 0 ||
        regions.tickets[back.ticket].peer != peer) {
      throw std::out_of_range("it gives back what was not lent to it");
    }
    (void)endLoan(regions, regions.tickets[back.ticket]);
    return;
  }
  const auto region = std::ranges::find(regions.all, back.region, &Region::id);
  if (region == regions.all.end()) {
    return;
  }
  Region::Reader& reader = region->readers[peer];
  reader.closed = reader.sent == back.received; // else tickets are on their way, and open it again
}

void Lender::withdraw(const Ticket& ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = regions_.find(static_cast<c10::DeviceIndex>(ticket.device));
  if (found == regions_.end()) { // it has closed
    return;
  }
  Lent& lent = found->second.tickets[ticket.number];
  Region::Reader& reader = endLoan(found->second, lent).readers[lent.peer];
  --reader.sent;
  reader.closed = reader.sent == 0;
}

bool Lender::keepsMore() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::ranges::any_of(regions_, [](const auto& each) { return each.second.all.size() > 1; });
}

void Lender::freeUnused() {
  std::vector<std::pair<c10::DeviceIndex, char*>> unused;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [device, regions] : regions_) {
      std::erase_if(regions.all, [&, device = device](const Region& region) {
        const bool free = region.id != 0 && !region.readers.empty() && region.used.none() &&
            std::ranges::all_of(region.readers, [](const auto& reader) { return reader.second.closed; });
        if (free) {
          unused.emplace_back(device, region.memory);
        }
        return free;
      });
    }
  }
  for (const auto& [device, memory] : unused) {
    const OnDevice onDevice(*runtime_, device);
    const RelaxedCapture relaxed(*runtime_);
    (void)runtime_->table().Free(memory);
  }
}

void Lender::lose(int peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [device, regions] : regions_) {
    for (const Lent& lent : regions.tickets) {
      if (lent.units != 0 && lent.peer == peer) {
        regions.byId(lent.region).retired = true;
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
  const Pair pair{peer, indexOf(verdict.here), indexOf(verdict.there)};
  const auto found = ways_.find(pair);
  const auto answered = verdict.accepted != 0 ? Way::kOffered : Way::kOpen; // the last state in which it may come
  if (found == ways_.end() || found->second.state > answered) {
    return {};
  }
  std::string why(verdict.why.data(), strnlen(verdict.why.data(), verdict.why.size()));
  found->second = {verdict.accepted != 0 ? Way::kOpen : Way::kClosed, why};
  return why;
}

std::map<int, std::string> Lender::ways(const std::string& otherwise) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<int, std::string> all;
  for (const auto& [pair, way] : ways_) {
    std::string& text = all[std::get<0>(pair)];
    text += c10::str(
        text.empty() ? "" : ", ", static_cast<int>(std::get<1>(pair)), "->", static_cast<int>(std::get<2>(pair)), " ",
        way.state == Way::kOpen ? "ipc" : otherwise);
    if (way.state != Way::kOpen) {
      text += way.state == Way::kOffered ? " (ipc is offered)" : c10::str(" (", way.why, ")");
    }
  }
  return all;
}

} // namespace torch_rpc_mpi
