// Where a thread with nothing to do sleeps, and how others wake it: an event count on a futex word.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace torch_rpc_mpi {

// The word: lies in this process, or in memory shared with the other ranks of this host, so that they can ring too.
struct BellWord {
  std::atomic<uint32_t> rings{0};
  std::atomic<uint32_t> sleepers{0};
};

// Usage of the sleeper: ticket = prepare(); look once more for work; then wait(ticket, …) or cancel(). A ring between
// prepare() and wait() makes wait() return at once, so that no wake-up is lost.
class Doorbell {
 public:
  explicit Doorbell(BellWord& word) : word_(word) {}

  uint32_t prepare() {
    word_.sleepers.fetch_add(1);
    return word_.rings.load();
  }
  void cancel() {
    word_.sleepers.fetch_sub(1);
  }
  // Returns when rung (true) or after `limit`; leaves the sleeping state.
  bool wait(uint32_t ticket, std::chrono::nanoseconds limit);

  // Any thread, any process that maps the word. Costs one atomic operation when nobody sleeps.
  static void ring(BellWord& word);
  void ring() {
    ring(word_);
  }

 private:
  BellWord& word_;
};

} // namespace torch_rpc_mpi
