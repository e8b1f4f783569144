#include "agent/call_table.h"

#include <algorithm>
#include <array>
#include <utility>

namespace torch_rpc_mpi {

namespace {

// Until a call fails that has been made long enough ago.
constexpr std::chrono::milliseconds kSoon{1};

// The lists of calls that are late or fail are kept, so that no memory is needed for that.
using Milliseconds = std::chrono::milliseconds;
constexpr std::array kKept{
    kSoon, kFailureDelay, lateBefore(Milliseconds(100)), lateBefore(Milliseconds(500)), lateBefore(Milliseconds(2000))};

} // namespace

CallTable::CallTable(uint32_t usesBefore) : usesBefore_(usesBefore) {
  for (const Milliseconds delay : kKept) {
    lists_.try_emplace(delay);
  }
}

uint64_t CallTable::add(PendingCall call, Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) {
    return 0;
  }
  const Milliseconds delay = call.timeout - lateBefore(call.timeout);
  if (delay.count() > 0) {
    lists_.try_emplace(delay); // whatever needs memory comes first
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
  slot.late = delay == slot.call.timeout;
  start(index, delay, now + delay);
  return slot.call.id;
}

void CallTable::start(uint32_t index, Milliseconds delay, Clock::time_point due) {
  Slot& slot = slots_[index];
  slot.delay = delay;
  if (delay.count() > 0) {
    slot.due = due;
    link(index, lists_.find(delay)->second);
    const auto deadline = due.time_since_epoch().count();
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
  const auto found = lists_.find(slot.delay);
  List& list = found->second;
  (slot.previous == kNone ? list.first : slots_[slot.previous].next) = slot.next;
  (slot.next == kNone ? list.last : slots_[slot.next].previous) = slot.previous;
  // The default timeout's list stays while it is in use; thousands of distinct ones must not pile up.
  if (list.first == kNone && lists_.size() > 8 && std::ranges::find(kKept, found->first) == kKept.end()) {
    lists_.erase(found);
  }
}

PendingCall CallTable::release(uint32_t index) {
  Slot& slot = slots_[index];
  if (slot.delay.count() > 0) {
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

// Of all lists the earliest: calls of different timeouts become late in the order of their ends.
std::optional<CallTable::Due> CallTable::takeDue(Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  uint32_t first = kNone;
  for (const auto& [delay, list] : lists_) {
    if (list.first != kNone && (first == kNone || slots_[list.first].due < slots_[first].due)) {
      first = list.first;
    }
  }
  if (first == kNone || slots_[first].due > now) {
    const auto next = first == kNone ? Clock::time_point::max() : slots_[first].due;
    nextDeadline_.store(next.time_since_epoch().count(), std::memory_order_relaxed);
    return std::nullopt;
  }
  Slot& slot = slots_[first];
  Due due{slot.call.id, slot.call.peer, std::nullopt};
  if (std::exchange(slot.late, true)) {
    due.expired = release(first);
  } else {
    const Milliseconds left = lateBefore(slot.call.timeout);
    unlink(first);
    start(first, left, slot.due + left);
  }
  return due;
}

void CallTable::explain(uint64_t id, int peer, const std::shared_ptr<const std::string>& whyLate) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Slot* slot = find(id);
  if (slot != nullptr && slot->call.peer == peer) {
    slots_[static_cast<uint32_t>(id)].call.whyLate = whyLate;
  }
}

// With mutex_ held. The first reason sticks.
void CallTable::fail(uint32_t index, const std::shared_ptr<const std::string>& failure, Clock::time_point now) {
  Slot& slot = slots_[index];
  if (slot.call.failure == nullptr) {
    if (slot.delay.count() > 0) {
      unlink(index);
    }
    slot.call.failure = failure;
    slot.late = true;
    const Milliseconds delay = now - slot.call.made < kFailureDelay ? kFailureDelay : kSoon;
    start(index, delay, now + delay);
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

void CallTable::forEach(c10::function_ref<void(const PendingCall& call)> look) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (uint32_t index = 0; index < slots_.size(); ++index) {
    if (slots_[index].call.future != nullptr) {
      look(slots_[index].call);
    }
  }
}

size_t CallTable::sizeOf(int peer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<size_t>(std::count_if(slots_.begin(), slots_.end(), [peer](const Slot& slot) {
    return slot.call.future != nullptr && slot.call.peer == peer;
  }));
}

} // namespace torch_rpc_mpi
