// Why a call is late: what its caller asks, what its callee says, and the words for it.
//
// Note [Late calls]
// ~~~~~~~~~~~~~~~~~
// A little before a call's time is over (lateBefore() in call_table.h), its caller asks the callee what has become of
// it, in a frame of a few bytes for all of one peer's calls that are late in that turn; the engine of the callee, which
// always answers, says it without the GIL. So the error of a timeout names the reason, and comes no later for that. A
// callee that has said nothing by then has a process, a host or a link that stands still, and that is what the error
// says. Nothing is asked of calls that are answered in time.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "peer/frame.h"

namespace torch_rpc_mpi {

// At most, in one frame.
inline constexpr size_t kLateCallsAsked = 256;

// Of one worker: what it is busy with.
struct Business {
  uint32_t workerThreads = 0;
  uint32_t running = 0; // requests that have a thread
  uint32_t waiting = 0; // of them, those that have made a call, for which they probably wait
  uint32_t reserved = 0;
  float oldestSeconds = 0;       // that the one which began first has been running
  std::array<char, 84> oldest{}; // its function, ending in zeros
};

// What has become of one call at its callee.
struct LateCall {
  enum class State : uint32_t {
    kAnswered = 0, // or lost on the way; nothing is known of it any more
    kArriving = 1, // not all of it is here
    kQueued = 2,
    kRunning = 3,
    kPromised = 4 // its function has returned a future
  };
  uint64_t id = 0;
  State state = State::kAnswered;
  uint32_t before = 0; // requests that come before it
  float seconds = 0;   // that it has been running
  uint32_t reserved = 0;
};

// The bodies of an inquiry and of the statement that answers it. What is read throws std::runtime_error if it makes no
// sense.
std::string writeInquiry(const std::vector<uint64_t>& ids);
std::vector<uint64_t> readInquiry(ConstSpan body);
struct Statement {
  Business business;
  std::vector<LateCall> calls;
};
std::string writeStatement(const Statement& statement);
Statement readStatement(ConstSpan body);

// For the end of the error of a timeout. callee: in the words of errors.
std::string notSent(const std::string& callee);
std::string notReady(); // its tensors are on a device
std::string whyLate(const std::string& callee, const Business& business, const LateCall& call);

} // namespace torch_rpc_mpi
