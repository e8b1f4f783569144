// How all ranks agree that no call is in flight anywhere, before they stop.
//
// Note [Draining]
// ~~~~~~~~~~~~~~~
// Counted in waves along a binary tree over the ranks. A rank that has been asked to join reports, once it is idle and
// its children have reported, how many frames its subtree has sent and received. The root is satisfied when two waves
// in a row find as many sent as received, and the same number: between the two moments nothing can have been under way
// (the four-counter method; F. Mattern, "Algorithms for distributed termination detection", 1987). Then it tells
// everybody that it is done, otherwise to count again. All of it travels in drain frames, which are not counted. No MPI
// collective is used: it could neither be cancelled nor survive a rank that is gone.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "peer/frame.h"
#include "transport/progress_token.h"

namespace torch_rpc_mpi {

// Frames that a rank, or a part of the tree, has sent and received.
struct DrainCounts {
  uint64_t sent = 0;
  uint64_t received = 0;
};

// Used under the progress token. May be gone through several times (generations).
class Drain {
 public:
  using Send = std::function<void(ProgressToken& token, int peer, std::string body)>;

  Drain(int rank, int size, Send send);

  void join();
  // This rank no longer waits. What it has reported in the present wave it cannot take back.
  void withdraw();
  // Returns why the frame makes no sense, or an empty text.
  std::string onFrame(ProgressToken& token, int source, ConstSpan body);
  // Reports if it is time to. `idle`: this rank waits for nothing and serves nothing.
  void advance(ProgressToken& token, bool idle, const DrainCounts& own);
  bool joined() const {
    return joined_;
  }
  bool reported() const { // in this wave
    return reported_;
  }
  // How often everybody has agreed, this rank with them.
  uint32_t agreements() const {
    return generation_;
  }
  // Whether the others have agreed, since the last call, because of a report after which this rank withdrew.
  bool takeMissed() {
    return std::exchange(missed_, false);
  }

 private:
  enum class Kind : uint32_t { kReport = 1, kAgain = 2, kDone = 3 };
  struct Body {
    Kind kind;
    uint32_t reserved;
    DrainCounts counts;
  };
  int parent() const {
    return rank_ == 0 ? -1 : (rank_ - 1) / 2;
  }
  void tell(ProgressToken& token, int peer, Kind kind, const DrainCounts& counts = {});
  void conclude(ProgressToken& token, Kind verdict);

  const int rank_;
  const int size_;
  const Send send_;
  bool joined_ = false;
  bool reported_ = false;
  bool outdated_ = false; // what was reported in this wave
  bool missed_ = false;
  std::array<std::optional<DrainCounts>, 2> children_;
  std::optional<uint64_t> lastTotal_; // root: of the wave before, when it balanced
  uint32_t generation_ = 0;
};

} // namespace torch_rpc_mpi
