// How much this rank and one other have under way to each other.
//
// Note [Credit]
// ~~~~~~~~~~~~~
// A sender may have so many requests, and so many bytes of large ones, with a peer that has not begun to run them; the
// rest waits at the sender, unencoded. The receiver reports what it took off its queue, cumulatively, in every frame it
// sends, and in a frame of its own when half a window has gathered unreported, or anything has for kStale (exchange.h).
// A request larger than the window goes when no other large one is out. Small requests, those that fit a frame, are
// bounded by their number alone and do not wait behind large ones: a call with a tensor of gigabytes is under way for a
// long time. Those that have passed it may be waiting for it at the receiver, in all of its threads and all of the
// window (Note [Creations]); so a large request may be one beyond the number. Responses take no credit: the caller
// asked for them, so its own requests bound them, and they can never wait behind requests.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "peer/frame.h"

namespace torch_rpc_mpi {

// Functions are for the holder of the progress token but for those marked. The window is immutable, the counters are
// atomics, releasedAtLook_ is the token's.
class Credit {
 public:
  Credit(size_t windowRequests, size_t windowBytes) : windowRequests_(windowRequests), windowBytes_(windowBytes) {}

  // As the sender of requests.
  bool allows(uint64_t bytes) const; // any thread, for which it is a hint; 0 bytes: a small request
  void sent(uint64_t bytes);
  void notSent(uint64_t bytes); // after all, what was counted as sent
  // Of a frame that arrived. Returns why that cannot be, or an empty text.
  std::string acknowledged(const FrameHeader& header);

  // As the receiver.
  bool released(uint64_t bytes);    // any thread: a request left the queue to be run. Whether to tell the peer now
  void report(FrameHeader& header); // in a frame that leaves
  bool unreported() const;
  // Whether something is unreported and nothing was released since the last look: the sender may wait although much
  // less than half a window is missing, because what it sent before is still being answered.
  bool stale();
  void tellsAgain() { // what released() returned true for is being told
    due_ = false;
  }

 private:
  const size_t windowRequests_, windowBytes_;
  // Requests sent and reported as taken, cumulative.
  std::atomic<uint64_t> sentRequests_{0}, sentBytes_{0}, ackedRequests_{0}, ackedBytes_{0};
  // What we took of its requests, and what it was told of that.
  std::atomic<uint64_t> releasedRequests_{0}, releasedBytes_{0}, toldRequests_{0}, toldBytes_{0};
  std::atomic<bool> due_{false};
  uint64_t releasedAtLook_ = 0;
};

} // namespace torch_rpc_mpi
