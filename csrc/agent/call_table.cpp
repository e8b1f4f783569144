#include "agent/call_table.h"

#include <algorithm>

namespace torch_rpc_mpi {

uint64_t CallTable::add(PendingCall call, Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) {
    return 0;
  }
  // First what needs memory: with what throws nothing has changed.
  List* const list = call.timeout.count() > 0 ? &lists_[call.timeout] : nullptr;
  uint32_t index = 0;
  if (freeSlots_.empty()) {
    index = static_cast<uint32_t>(slots_.size());
    slots_.emplace_back().uses = usesBefore_;
    freeSlots_.reserve(slots_.capacity()); // so that release() needs none
  } else {
    index = freeSlots_.back();
    freeSlots_.pop_back();
  }
  Slot& slot = slots_[index];
  slot.call = std::move(call);
  if (++slot.uses == 0) {
    slot.uses = 1; // with slot 0 the id would be the one that means "closed"
  }
  size_.fetch_add(1);
  if (list != nullptr) {
    slot.deadline = now + slot.call.timeout;
    link(index, *list);
    const auto deadline = slot.deadline.time_since_epoch().count();
    if (deadline < nextDeadline_.load(std::memory_order_relaxed)) {
      nextDeadline_.store(deadline, std::memory_order_relaxed);
    }
  }
  return (static_cast<uint64_t>(slot.uses) << 32) | index;
}

void CallTable::link(uint32_t index, List& list) {
  Slot& slot = slots_[index];
  slot.previous = list.last;
  slot.next = kNone;
  (list.last == kNone ? list.first : slots_[list.last].next) = index;
  list.last = index;
}

void CallTable::unlink(uint32_t index) {
  const Slot& slot = slots_[index];
  const auto found = lists_.find(slot.call.timeout);
  List& list = found->second;
  (slot.previous == kNone ? list.first : slots_[slot.previous].next) = slot.next;
  (slot.next == kNone ? list.last : slots_[slot.next].previous) = slot.previous;
  // The default timeout's list stays while it is in use; thousands of distinct ones must not pile up.
  if (list.first == kNone && lists_.size() > 8) {
    lists_.erase(found);
  }
}

PendingCall CallTable::release(uint32_t index) {
  Slot& slot = slots_[index];
  if (slot.call.timeout.count() > 0) {
    unlink(index);
  }
  PendingCall call = std::move(slot.call);
  slot.call = PendingCall();
  freeSlots_.push_back(index);
  size_.fetch_sub(1);
  return call;
}

// With mutex_ held.
const CallTable::Slot* CallTable::find(uint64_t id) const {
  const auto index = static_cast<uint32_t>(id);
  if (index >= slots_.size() || slots_[index].uses != id >> 32 || slots_[index].call.future == nullptr) {
    return nullptr;
  }
  return &slots_[index];
}

std::optional<PendingCall> CallTable::take(uint64_t id, int peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Slot* slot = find(id);
  if (slot == nullptr || slot->call.peer != peer) {
    return std::nullopt;
  }
  return release(static_cast<uint32_t>(id));
}

bool CallTable::awaitsOther(uint64_t id, int peer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Slot* slot = find(id);
  return slot != nullptr && slot->call.peer != peer;
}

std::vector<PendingCall> CallTable::takeExpired(Clock::time_point now) {
  std::vector<PendingCall> expired;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint32_t> due;
  auto next = Clock::time_point::max();
  for (const auto& [timeout, list] : lists_) {
    uint32_t index = list.first;
    for (; index != kNone && slots_[index].deadline <= now; index = slots_[index].next) {
      due.push_back(index);
    }
    if (index != kNone) {
      next = std::min(next, slots_[index].deadline);
    }
  }
  expired.reserve(due.size());
  for (const uint32_t index : due) {
    expired.push_back(release(index));
  }
  nextDeadline_.store(next.time_since_epoch().count(), std::memory_order_relaxed);
  return expired;
}

// With mutex_ held.
template <class Which>
std::vector<PendingCall> CallTable::takeIf(Which which) {
  std::vector<PendingCall> taken;
  taken.reserve(size_.load());
  for (uint32_t index = 0; index < slots_.size(); ++index) {
    if (slots_[index].call.future != nullptr && which(slots_[index].call)) {
      taken.push_back(release(index));
    }
  }
  return taken;
}

std::vector<PendingCall> CallTable::takeAllOf(int peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return takeIf([peer](const PendingCall& call) { return call.peer == peer; });
}

std::vector<PendingCall> CallTable::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  return takeIf([](const PendingCall&) { return true; });
}

size_t CallTable::sizeOf(int peer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<size_t>(std::count_if(slots_.begin(), slots_.end(), [peer](const Slot& slot) {
    return slot.call.future != nullptr && slot.call.peer == peer;
  }));
}

} // namespace torch_rpc_mpi
