#include "base/flight_recorder.h"

#include <thread>

#include "check.h"

using namespace torch_rpc_mpi;

TEST(flight_recorder_keeps_the_last_events_in_their_order) {
  const auto recorder = std::make_unique<FlightRecorder>();
  CHECK_THAT(recorder->events().empty());
  const uint64_t count = FlightRecorder::kSlots + 100;
  const auto before = std::chrono::system_clock::now();
  for (uint64_t i = 0; i < count; ++i) {
    recorder->record(CallEvent::kSent, -1, i, 0x102, 7);
  }
  const auto events = recorder->events();
  CHECK_EQUAL(events.size(), FlightRecorder::kSlots);
  for (size_t i = 0; i < events.size(); ++i) {
    CHECK_EQUAL(events[i].callId, i + 100);
  }
  CHECK_THAT(events[0].kind == CallEvent::kSent);
  CHECK_EQUAL(events[0].peer, -1);
  CHECK_EQUAL(events[0].messageType, 0x102U);
  CHECK_EQUAL(events[0].bytes, 7U);
  // Their times are those of the clock, but for the rate that is taken from the recorder's age.
  CHECK_THAT(events.back().when >= events.front().when);
  CHECK_THAT(events.back().when - before < std::chrono::seconds(10));
}

TEST(flight_recorder_shows_no_event_that_is_half_written) {
  const auto recorder = std::make_unique<FlightRecorder>();
  std::atomic<bool> stop{false};
  std::vector<std::thread> writers;
  for (int peer = 1; peer <= 2; ++peer) {
    writers.emplace_back([&, peer] {
      for (uint64_t i = 0; !stop; ++i) {
        recorder->record(CallEvent::kMade, peer, i, 0, i * 2 + static_cast<uint64_t>(peer));
      }
    });
  }
  size_t seen = 0;
  for (int look = 0; look < 50 || seen == 0; ++look) {
    for (const FlightRecorder::Event& event : recorder->events()) {
      CHECK_EQUAL(event.bytes, event.callId * 2 + static_cast<uint64_t>(event.peer));
      ++seen;
    }
  }
  stop = true;
  for (std::thread& writer : writers) {
    writer.join();
  }
}
