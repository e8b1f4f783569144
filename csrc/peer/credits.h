// How much this rank and each other have under way to each other.
//
// Note [Credits]
// ~~~~~~~~~~~~~~
// A sender may have so many requests, and so many bytes of large ones, with a peer that has not begun to run them; the
// rest waits at the sender, unencoded. The receiver reports what it took off its queue, cumulatively, in every frame it
// sends, and in a frame of its own when half a window has gathered unreported, or anything has for kStale. A request
// larger than the window goes when no other large one is out. Small requests, those that fit a frame, are bounded by
// their number alone and do not wait behind large ones: a call with a tensor of gigabytes is under way for a long time.
// Responses take no credit: the caller asked for them, so its own requests bound them, and they can never wait behind
// requests.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "peer/frame.h"

namespace torch_rpc_mpi {

// Functions are for the holder of the progress token but for those marked. Members: the window and the addresses in
// peers_ are immutable after construction, the Peers are atomics but for releasedAtLook, which is the token's, as
// nextLook_; dueMutex_ guards duePeers_.
class Credits {
 public:
  Credits(int peers, size_t windowRequests, size_t windowBytes);

  // As the sender of requests.
  bool allows(int peer, uint64_t bytes) const; // any thread, for which it is a hint; 0 bytes: a small request
  void sent(int peer, uint64_t bytes);
  void acknowledged(int peer, const FrameHeader& header); // of a frame that arrived

  // As the receiver.
  void released(int peer, uint64_t bytes);    // any thread: a request left the queue to be run
  void report(int peer, FrameHeader& header); // in a frame that leaves
  bool unreported(int peer) const;
  bool hasDue() const { // any thread
    return due_.load(std::memory_order_relaxed);
  }
  // Peers to be told now, as far as they are not yet: those with half a window unreported …
  std::vector<int> takeDue();
  // … and those that no frame has told for a while: they may wait although much less is missing, because what they sent
  // before is still being answered.
  std::vector<int> takeStale(std::chrono::steady_clock::time_point now);

 private:
  struct Peer {
    // Requests sent and reported as taken, cumulative.
    std::atomic<uint64_t> sentRequests{0}, sentBytes{0}, ackedRequests{0}, ackedBytes{0};
    // What we took of its requests, and what it was told of that.
    std::atomic<uint64_t> releasedRequests{0}, releasedBytes{0}, toldRequests{0}, toldBytes{0};
    std::atomic<bool> due{false};
    uint64_t releasedAtLook = 0; // by takeStale()
  };

  const size_t windowRequests_, windowBytes_; // for each peer
  std::vector<std::unique_ptr<Peer>> peers_;
  std::chrono::steady_clock::time_point nextLook_{};

  std::mutex dueMutex_;
  std::vector<int> duePeers_;
  std::atomic<bool> due_{false};
};

} // namespace torch_rpc_mpi
