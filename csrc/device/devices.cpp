#include "device/devices.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <new>

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "host/fork_guard.h"
#include "host/no_memory.h"

namespace torch_rpc_mpi {

namespace {

// Of a turn, so that many events do not make it long.
constexpr size_t kAskedInTurn = 16;
// No call waits for what is held.
constexpr auto kBetweenPolls = std::chrono::microseconds(15);

// Also when the device is broken: nothing more will be done there.
bool isOver(const DeviceEvent& event) {
  try {
    return event.complete();
  } catch (const DeviceError&) {
    return true;
  }
}

} // namespace

Devices::Devices(
    std::shared_ptr<const DeviceRuntime> runtime,
    std::vector<c10::Device> devices,
    size_t chunk,
    bool mpiTakesMemory)
    : devices_(std::move(devices)),
      chunk_(chunk),
      mpiTakesMemory_(mpiTakesMemory),
      runtime_(std::move(runtime)) {
  watchForks();
  for (const c10::Device device : devices_) {
    pools_.emplace(
        device.index(),
        Pools{
            std::make_shared<EventPool>(runtime_, device.index()),
            std::make_shared<PinnedPool>(runtime_, device.index())});
  }
}

void Devices::share(const std::vector<DeviceName>& names, std::vector<bool> neighbours, size_t largest) {
  lender_ = std::make_unique<Lender>(runtime_, names, std::move(neighbours), largest);
  borrower_ = std::make_shared<Borrower>(runtime_, names);
}

std::vector<c10::Stream> Devices::poolStreams() const {
  std::vector<c10::Stream> streams;
  streams.reserve(devices_.size());
  for (const c10::Device device : devices_) {
    streams.push_back(poolStream(device));
  }
  return streams;
}

// From the pool out of which torch takes streams for callbacks of futures as well: a program that captures a graph
// while calls go on does so in a stream of the other, of high priority.
c10::Stream Devices::poolStream(c10::Device device) const {
  return c10::impl::VirtualGuardImpl(runtime_->type()).getStreamFromGlobalPool(device, /*isHighPriority=*/false);
}

c10::Stream Devices::currentStream(c10::Device device) const {
  return c10::impl::VirtualGuardImpl(runtime_->type()).getStream(device);
}

void Devices::order(const c10::Stream& earlier, const c10::Stream& later) {
  if (earlier == later) {
    return;
  }
  DeviceEvent between = event(earlier.device());
  {
    const OnDevice onDevice(*runtime_, earlier.device_index());
    between.record(runtime_->handleOf(earlier));
  }
  const OnDevice onDevice(*runtime_, later.device_index());
  between.block(runtime_->handleOf(later));
}

at::DataPtr Devices::allocate(const c10::Stream& stream, size_t bytes) const {
  const c10::StreamGuard guard(stream);
  try {
    return c10::GetAllocator(runtime_->type())->allocate(bytes);
  } catch (const c10::Error& error) {
    throw NoMemory(c10::str("a tensor on ", stream.device(), " (", error.what_without_backtrace(), ")"), bytes);
  }
}

void Devices::keepFor(const at::DataPtr& memory, const c10::Stream& stream) const {
  c10::impl::VirtualGuardImpl(runtime_->type()).recordDataPtrOnStream(memory, stream);
}

void Devices::holdUntil(DeviceEvent event, std::shared_ptr<void> object) {
  if (closed_) {
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  try {
    if (held_.size() == held_.capacity()) {
      held_.reserve(std::max<size_t>(2 * held_.size(), 64));
    }
  } catch (const std::bad_alloc&) { // then it is kept for ever, rather than changed under the device
    alignas(Held) std::array<std::byte, sizeof(Held)> kept;
    new (kept.data()) Held{std::move(event), std::move(object)};
    return;
  }
  held_.push_back({std::move(event), std::move(object)});
  holds_ = true;
}

bool Devices::poll() {
  std::vector<Held> over; // destroyed without the lock
  if (!holds()) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto now = Clock::now();
  if (now < nextPoll_) {
    return false;
  }
  nextPoll_ = now + kBetweenPolls;
  for (size_t asked = std::min(held_.size(), kAskedInTurn); asked > 0 && !held_.empty(); --asked) {
    next_ = next_ < held_.size() ? next_ : 0;
    if (isOver(held_[next_].event)) {
      over.push_back(std::move(held_[next_]));
      held_[next_] = std::move(held_.back());
      held_.pop_back();
    } else {
      ++next_;
    }
  }
  holds_ = !held_.empty();
  return !over.empty();
}

void Devices::close() {
  letGo();
  closed_ = true;
  if (lender_ != nullptr) {
    borrower_->close();
    lender_->close();
  }
  for (auto& [index, pools] : pools_) {
    pools.pinned->trim();
  }
}

void Devices::letGo() {
  std::vector<Held> held; // destroyed without the lock
  const std::lock_guard<std::mutex> lock(mutex_);
  held.swap(held_);
  holds_ = false;
}

bool Devices::keepsMemory() const {
  return pinnedBytes() > 0 || (lender_ != nullptr && (lender_->keepsMore() || borrower_->keepsMore()));
}

void Devices::trim() {
  const Clock::time_point before(Clock::duration(lastTrim_.exchange(Clock::now().time_since_epoch().count())));
  if (lender_ != nullptr) {
    borrower_->closeUnused(before);
    lender_->freeUnused();
  }
  const uint64_t pinned = counters.sentPinned + counters.receivedPinned;
  if (pinnedAtTrim_.exchange(pinned) != pinned) {
    return;
  }
  for (auto& [index, pools] : pools_) {
    pools.pinned->trim();
  }
}

size_t Devices::pinnedBytes() const {
  size_t bytes = 0;
  for (const auto& [index, pools] : pools_) {
    bytes += pools.pinned->bytes();
  }
  return bytes;
}

} // namespace torch_rpc_mpi
