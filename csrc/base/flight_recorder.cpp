#include "base/flight_recorder.h"

#include <algorithm>

namespace torch_rpc_mpi {

FlightRecorder& FlightRecorder::instance() {
  static FlightRecorder recorder;
  return recorder;
}

std::vector<FlightRecorder::Event> FlightRecorder::events() const {
  using Nanoseconds = std::chrono::duration<double, std::nano>;
  const double ticksSince = static_cast<double>(std::max<uint64_t>(ticks() - ticksAtStart_, 1));
  const double each = Nanoseconds(std::chrono::system_clock::now() - start_).count() / ticksSince;
  std::vector<Event> events;
  const uint64_t end = next_.load(std::memory_order_acquire);
  for (uint64_t number = end - std::min<uint64_t>(end, kSlots); number < end; ++number) {
    const Slot& slot = slots_[number % kSlots];
    if (slot.stamp.load(std::memory_order_acquire) != number + 1) {
      continue;
    }
    const uint64_t at = slot.ticks.load(std::memory_order_acquire);
    Event event;
    event.callId = slot.callId.load(std::memory_order_acquire);
    event.bytes = slot.bytes.load(std::memory_order_acquire);
    const uint64_t what = slot.what.load(std::memory_order_acquire);
    if (slot.stamp.load(std::memory_order_acquire) != number + 1) {
      continue; // overwritten meanwhile
    }
    event.when = start_ +
        std::chrono::duration_cast<std::chrono::system_clock::duration>(
                     Nanoseconds(static_cast<double>(at - ticksAtStart_) * each));
    event.kind = static_cast<CallEvent>(what >> 56);
    event.messageType = static_cast<uint32_t>(what >> 32) & 0xffffff;
    event.peer = static_cast<int>(static_cast<uint32_t>(what));
    events.push_back(event);
  }
  return events;
}

} // namespace torch_rpc_mpi
