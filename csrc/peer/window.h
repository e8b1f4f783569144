// How many messages a peer of this host may have that it has not taken yet.
//
// Note [Untaken messages]
// ~~~~~~~~~~~~~~~~~~~~~~~
// MPI moves small messages between the ranks of a host through a few cells of shared memory: MPICH gives a rank 64 for
// all of its peers. A send is complete as soon as its message lies in one, and a peer that is stopped, killed or slow
// keeps what it was sent. Once it has all cells, no other rank of the host can be reached. Unfinished sends therefore
// bound nothing. Each rank counts what it has received of each neighbour, in memory that they share, and a sender posts
// the next message only while twice what the peer has not taken, and what all neighbours together have not taken,
// are less than the budget: a dynamic threshold, as switches have it for ports that share a buffer (Choudhury and
// Hahne, 1998). So one peer that takes nothing holds 16 cells and four hold 39; the others go on, with 3 each. A peer
// that has taken all may have one message until a quarter more is out, so that twenty such peers do no harm. What waits
// does so in Outgoing, for that peer alone; when it may go, what is small goes in batches.
// - Frames and chunks are compared with the threshold each for themselves, so that neither keeps the other waiting.
// - What a peer has that is dead stays counted: MPI does not get these cells back.
// - Counting by the receiver needs no messages and is exact. A synchronous send as every n-th, or a count in the frames
//   that the peer sends, leaves the last messages to each peer in doubt: with many peers that use up the budget
//   although all is well.
// - Peers of other hosts share no cells with anybody, and are not bounded here.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "transport/transport.h"

namespace torch_rpc_mpi {

class Window;

// Of all windows of a rank. Everything is guarded by the progress token.
class WindowBudget {
 public:
  WindowBudget(size_t budget, size_t peers) : budget_(budget) {
    windows_.reserve(peers);
  }

 private:
  friend class Window;
  void look(ProgressToken& token);

  const size_t budget_;
  std::vector<Window*> windows_; // those that have something untaken
  size_t untaken_ = 0;
};

// Everything is guarded by the progress token.
class Window {
 public:
  Window(int rank, Transport& transport, WindowBudget& budget) : rank_(rank), transport_(transport), budget_(budget) {}

  // Whether another message may be posted.
  bool allows(ProgressToken& token, Channel channel);
  void posted(Channel channel);
  // The engine is woken when the peer has taken half of what it has: woken for each, it would take the core from it.
  void await(ProgressToken& token);

 private:
  friend class WindowBudget;
  struct Count {
    uint64_t posted = 0, taken = 0;
    size_t untaken() const {
      return posted - taken;
    }
  };
  Count& of(Channel channel) {
    return counts_[channel == Channel::kFrame ? 0 : 1];
  }
  bool fits(Channel channel);
  void look(ProgressToken& token);

  const int rank_;
  Transport& transport_;
  WindowBudget& budget_;
  std::array<Count, 2> counts_;
  bool listed_ = false; // in WindowBudget::windows_
  bool bounded_ = true; // until it is found out that the peer does not count
};

} // namespace torch_rpc_mpi
