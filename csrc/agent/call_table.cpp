#include "agent/call_table.h"

#include <algorithm>

namespace torch_rpc_mpi {

namespace {

// The lists of calls that fail; kept, so that no memory is needed to fail one.
constexpr std::chrono::milliseconds kSoon{1};

} // namespace

CallTable::CallTable(uint32_t usesBefore) : usesBefore_(usesBefore), lists_{{kSoon, {}}, {kFailureDelay, {}}} {}

uint64_t CallTable::add(PendingCall call, Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) {
    return 0;
  }
  if (call.timeout.count() > 0) {
    lists_.try_emplace(call.timeout); // whatever needs memory comes first
  }
  uint32_t index = 0;
  if (freeSlots_.empty()) {
    index = static_cast<uint32_t>(slots_.size());
    slots_.emplace_back().uses = usesBefore_;
    freeSlots_.reserve(slots_.capacity());
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
  slot.call.id = (static_cast<uint64_t>(slot.uses) << 32) | index;
  start(index, slot.call.timeout, now);
  return slot.call.id;
}

void CallTable::start(uint32_t index, std::chrono::milliseconds timeout, Clock::time_point now) {
  Slot& slot = slots_[index];
  slot.call.timeout = timeout;
  if (timeout.count() > 0) {
    slot.deadline = now + timeout;
    link(index, lists_.find(timeout)->second);
    const auto deadline = slot.deadline.time_since_epoch().count();
    if (deadline < nextDeadline_.load(std::memory_order_relaxed)) {
      nextDeadline_.store(deadline, std::memory_order_relaxed);
    }
  }
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
  if (list.first == kNone && lists_.size() > 8 && found->first != kSoon && found->first != kFailureDelay) {
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
  if (slot == nullptr || slot->call.peer != peer || slot->call.failure != nullptr) {
    return std::nullopt;
  }
  return release(static_cast<uint32_t>(id));
}

bool CallTable::awaitsOther(uint64_t id, int peer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Slot* slot = find(id);
  return slot != nullptr && slot->call.peer != peer;
}

std::optional<PendingCall> CallTable::takeExpired(Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto next = Clock::time_point::max();
  for (const auto& [timeout, list] : lists_) {
    if (list.first == kNone) {
      continue;
    }
    if (slots_[list.first].deadline <= now) {
      return release(list.first);
    }
    next = std::min(next, slots_[list.first].deadline);
  }
  nextDeadline_.store(next.time_since_epoch().count(), std::memory_order_relaxed);
  return std::nullopt;
}

// With mutex_ held. The first reason sticks.
void CallTable::fail(uint32_t index, const std::shared_ptr<const std::string>& failure, Clock::time_point now) {
  Slot& slot = slots_[index];
  if (slot.call.failure == nullptr) {
    if (slot.call.timeout.count() > 0) {
      unlink(index);
    }
    slot.call.failure = failure;
    start(index, now - slot.call.made < kFailureDelay ? kFailureDelay : kSoon, now);
  }
}

bool CallTable::failLater(
    uint64_t id,
    int peer,
    const std::shared_ptr<const std::string>& failure,
    Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Slot* slot = find(id);
  if (slot == nullptr || slot->call.peer != peer) {
    return false;
  }
  fail(static_cast<uint32_t>(id), failure, now);
  return true;
}

void CallTable::failAllOf(int peer, const std::shared_ptr<const std::string>& failure, Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (uint32_t index = 0; index < slots_.size(); ++index) {
    if (slots_[index].call.future != nullptr && slots_[index].call.peer == peer) {
      fail(index, failure, now);
    }
  }
}

void CallTable::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
}

std::optional<PendingCall> CallTable::takeAny() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (; closedUpTo_ < slots_.size(); ++closedUpTo_) {
    if (slots_[closedUpTo_].call.future != nullptr) {
      return release(closedUpTo_);
    }
  }
  return std::nullopt;
}

size_t CallTable::sizeOf(int peer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<size_t>(std::count_if(slots_.begin(), slots_.end(), [peer](const Slot& slot) {
    return slot.call.future != nullptr && slot.call.peer == peer;
  }));
}

} // namespace torch_rpc_mpi
