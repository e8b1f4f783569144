// How a thread that finds nothing to do passes the time until its next look: the engine's one policy, and the table of
// its constants.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/clock.h"

namespace torch_rpc_mpi {

// The log in docs/performance.md says what those of the leader and the guest are for, and what was measured.
struct IdlingTimes {
  using Microseconds = std::chrono::microseconds;
  using Milliseconds = std::chrono::milliseconds;

  // The standby's looks whether there is something for it: a long request delays progress by two of them at most.
  static constexpr Microseconds kTick{200};
  // The first sleep at the doorbell. Each that nothing has ended is followed by one twice as long, up to max_sleep.
  static constexpr Microseconds kFirstSleep{50};
  // Where cores are scarce and others get much done: the leader's pause, after which it finds more …
  static constexpr Microseconds kNap{50};
  // … and much is so many pieces of work in the last window.
  static constexpr Microseconds kWindow{100};
  static constexpr uint64_t kMuch = 3;
  // On a crowded host: a leader that was away from its core for so long polls only briefly for a while.
  static constexpr Microseconds kAway{50};
  static constexpr Microseconds kBriefly{30};
  static constexpr Milliseconds kRemembered{10};
  // A guest's thread may have signals to serve, however much there is to do here: looked at after so many turns that
  // did something, of which one takes 0.2 ms at most, and after each that did not.
  static constexpr Milliseconds kLongestStay{25};
  static constexpr int kTurnsPerLook = 64;
};

struct IdlingOptions {
  std::chrono::nanoseconds spinTime = std::chrono::milliseconds(1);
  std::chrono::nanoseconds maxSleep = std::chrono::milliseconds(1);
  std::chrono::nanoseconds maxRest = std::chrono::milliseconds(30); // instead, while the driver rests
  bool scarce = true;                                               // cores: see Note [Sharing cores]
  bool crowded = false; // more ranks on this host than cores that this one may use
};

// Of the leader, see Note [Sharing cores]. Used by one thread at a time; the count it looks at is written by others.
class Idling {
 public:
  enum class Pause { kNone, kYield, kNap };
  // What comes before the next look, and how that is done.
  struct Step {
    Pause pause = Pause::kNone;
    std::chrono::nanoseconds sleep{0}; // at the doorbell, at most; 0: the look is a turn
  };

  // workDone: of the pieces of work that other threads have done, ever growing.
  Idling(IdlingOptions options, const std::atomic<uint64_t>& workDone) : options_(options), workDone_(workDone) {}

  // A thread begins to lead.
  void begin(Clock::time_point now);
  // It has looked, and found something or not. rests: see EngineDriver.
  Step next(bool found, bool rests, Clock::time_point now);
  // It comes back from a nap.
  void napped(Clock::time_point now) {
    lastLook_ = now;
  }

 private:
  bool othersWorkMuch(Clock::time_point now);
  std::chrono::nanoseconds spinLimit(Clock::time_point now);

  const IdlingOptions options_;
  const std::atomic<uint64_t>& workDone_;

  bool spinning_ = true;
  std::chrono::nanoseconds nextSleep_ = IdlingTimes::kFirstSleep;
  Clock::time_point lastActivity_;
  Clock::time_point lastLook_;
  Clock::time_point brieflyUntil_{}; // of all leaders

  uint64_t workBefore_ = 0; // when the window began
  Clock::time_point windowBegan_;
  bool much_ = false;
};

} // namespace torch_rpc_mpi
