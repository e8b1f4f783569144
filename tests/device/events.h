// Events of the test device. Those for several processes have their state in memory that the processes share.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include <sys/types.h>

#include "shared_file.h"
#include "streams.h"

namespace rpctest {

class Event {
 public:
  // As cudaEventCreateWithFlags.
  static constexpr unsigned kDisableTiming = 2;
  static constexpr unsigned kInterprocess = 4;

  // A nullptr where there is no memory, or where the handle's process has ended.
  static Event* make(int device, unsigned flags);
  static Event* open(const Handle& handle, int device);
  static void destroy(Event* event); // what is queued still happens

  int device() const {
    return device_;
  }
  unsigned flags() const {
    return flags_;
  }
  Handle handle() const;

  void record(Stream& stream);
  // The stream waits for the latest record, as it is now. Not recorded: there is nothing to wait for.
  void block(Stream& stream) const;
  bool query() const;
  void synchronize() const;
  double millisecondsSince(const Event& start) const; // of two that are done

 private:
  // A record has a place of its own, so that a wait is for that record and not for a later one. Zeros to start with.
  struct Record {
    std::atomic<uint32_t> finished; // its number, which others wait for
    std::atomic<pid_t> recorder;
    std::atomic<int64_t> nanoseconds;
  };
  struct State {
    std::atomic<uint32_t> records; // made so far; the number of the latest
    std::array<Record, 60> latest;
    Record& record(uint32_t number) {
      return latest[number % latest.size()];
    }
  };
  static_assert(sizeof(State) <= 4096);
  static void wait(State& state, uint32_t number);
  static bool finished(State& state, uint32_t number);

  Event(std::shared_ptr<State> state, int device, unsigned flags, const Handle& handle);

  const std::shared_ptr<State> state_; // shared with tasks that are queued
  const int device_;
  const unsigned flags_;
  const Handle handle_;
};

int64_t liveEvents();

} // namespace rpctest
