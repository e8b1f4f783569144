// Which ranks watch which.
#pragma once

#include <functional>
#include <vector>

namespace torch_rpc_mpi {

// Note [Who watches whom]
// ~~~~~~~~~~~~~~~~~~~~~~~
// The ranks of one host see each other's end by themselves (host/neighbours.h). Besides, each rank is watched by one of
// another host, so that what this costs a rank does not grow with the group. The ranks stand in a ring: the first of
// each host, then the second of each, and so on. A rank's watcher is the nearest before it that is of another host and
// alive: when a watcher is lost, the next one takes over, and all know without a word who that is.
//
// Guarded by whoever has it.
class WatchRing {
 public:
  // hosts: by rank, the same number for the ranks of one host.
  WatchRing(int self, std::vector<int> hosts);

  // It has left, or is lost.
  void lose(int rank);
  // Whom this rank watches, ascending.
  std::vector<int> watched() const;
  // The other ranks of that one's host that are alive, ascending.
  std::vector<int> besides(int rank) const;
  // Whether of that one's host this rank is the first of the others that live. Any thread: it knows nothing of lose().
  bool speaksFor(int rank, const std::function<bool(int)>& lives) const;

 private:
  const int self_;
  const std::vector<int> hosts_; // by rank
  std::vector<int> ring_;        // the ranks in their order
  std::vector<bool> lost_;       // by rank
};

} // namespace torch_rpc_mpi
