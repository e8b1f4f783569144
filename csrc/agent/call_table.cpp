#include "agent/call_table.h"

#include <algorithm>
#include <new>
#include <utility>

namespace torch_rpc_mpi {

namespace {

// Until a call fails that has been made long enough ago.
using Milliseconds = std::chrono::milliseconds;
constexpr Milliseconds kSoon{1};

const auto* const kLost = new std::shared_ptr<const std::string>(
    std::make_shared<const std::string>("The worker that was called can no longer answer"));

} // namespace

std::shared_ptr<const std::string> sharedText(const std::string& text) noexcept {
  try {
    return std::make_shared<const std::string>(text);
  } catch (const std::bad_alloc&) {
    return *kLost;
  }
}

CallTable::CallTable(uint32_t usesBefore) : usesBefore_(usesBefore) {}

uint64_t CallTable::add(PendingCall call, Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) {
    return 0;
  }
  uint32_t index = 0;
  if (freeSlots_.empty()) { // whatever needs memory comes first
    index = static_cast<uint32_t>(slots_.size());
    slots_.emplace_back().uses = usesBefore_;
    freeSlots_.reserve(slots_.capacity());
    queue_.reserve(slots_.capacity());
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
  const Milliseconds timeout = slot.call.timeout, before = lateBefore(timeout);
  slot.late = before.count() == 0;
  if (timeout.count() > 0) {
    start(index, now + timeout - before);
  }
  return slot.call.id;
}

void CallTable::start(uint32_t index, Clock::time_point due) {
  queue_.emplace_back(); // for which there is room
  rise(queue_.size() - 1, {due, started_++, index});
  const auto deadline = due.time_since_epoch().count();
  if (deadline < nextDeadline_.load(std::memory_order_relaxed)) {
    nextDeadline_.store(deadline, std::memory_order_relaxed);
  }
}

void CallTable::stop(uint32_t index) {
  const size_t place = std::exchange(slots_[index].place, kNone);
  const Waiting last = queue_.back();
  queue_.pop_back();
  if (place == queue_.size()) {
    return;
  }
  if (place > 0 && last < queue_[(place - 1) / 2]) {
    rise(place, last);
  } else {
    sink(place, last);
  }
}

void CallTable::put(size_t place, const Waiting& waiting) {
  queue_[place] = waiting;
  slots_[waiting.index].place = static_cast<uint32_t>(place);
}

void CallTable::rise(size_t place, const Waiting& waiting) {
  while (place > 0 && waiting < queue_[(place - 1) / 2]) {
    put(place, queue_[(place - 1) / 2]);
    place = (place - 1) / 2;
  }
  put(place, waiting);
}

void CallTable::sink(size_t place, const Waiting& waiting) {
  for (size_t child = 2 * place + 1; child < queue_.size(); child = 2 * place + 1) {
    if (child + 1 < queue_.size() && queue_[child + 1] < queue_[child]) {
      ++child;
    }
    if (!(queue_[child] < waiting)) {
      break;
    }
    put(place, queue_[child]);
    place = child;
  }
  put(place, waiting);
}

PendingCall CallTable::release(uint32_t index) {
  Slot& slot = slots_[index];
  if (slot.place != kNone) {
    stop(index);
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

std::optional<CallTable::Due> CallTable::takeDue(Clock::time_point now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (queue_.empty() || queue_.front().due > now) {
    const auto next = queue_.empty() ? Clock::time_point::max() : queue_.front().due;
    nextDeadline_.store(next.time_since_epoch().count(), std::memory_order_relaxed);
    return std::nullopt;
  }
  const Waiting first = queue_.front();
  Slot& slot = slots_[first.index];
  Due due{slot.call.id, slot.call.peer, std::nullopt};
  if (std::exchange(slot.late, true)) {
    due.expired = release(first.index);
  } else {
    stop(first.index);
    start(first.index, first.due + lateBefore(slot.call.timeout));
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
    if (slot.place != kNone) {
      stop(index);
    }
    slot.call.failure = failure;
    slot.late = true;
    start(index, now + (now - slot.call.made < kFailureDelay ? kFailureDelay : kSoon));
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
