// The other ranks of this host, reached without MPI: how to wake them, how much they have taken of what they were sent,
// and whether they are still alive.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "host/doorbell.h"
#include "host/other_process.h"

namespace torch_rpc_mpi {

// Each process puts its doorbell, and what it has taken, into memory that has no name, and gives the others an address
// by which they can map it: a process id and a file descriptor of that process, plus a random mark that only the right
// one holds. So nothing is left behind by a crash, and a process of another host or container, where the ids mean
// something else, is merely no neighbour.
//
// meet() and ringEachOther() are called once, before threads share the object. After that: ring() and bell() by any
// thread, the others by one at a time.
class Neighbours {
 public:
  Neighbours();
  ~Neighbours();
  Neighbours(const Neighbours&) = delete;
  Neighbours& operator=(const Neighbours&) = delete;

  // For the other ranks; empty if this system cannot share the bell.
  std::string address() const;
  // Everybody's address, by rank. Maps those that can be reached. While it runs all of them must be alive.
  void meet(const std::vector<std::string>& addresses, int self);

  BellWord& bell();
  // Wakes the rank if it is a neighbour and sleeps.
  void ring(int rank) {
    if (bells_[rank] != nullptr) {
      Doorbell::ring(*bells_[rank]);
    }
  }
  // One more message of that rank was received, of some kind below kKinds; wakes it if it waits for that.
  static constexpr size_t kKinds = 2;
  void took(int rank, size_t kind);
  // How many messages of this rank that one has received; nothing if it is no neighbour.
  std::optional<uint64_t> taken(int rank, size_t kind) const;
  // It rings when it has received so many messages of this rank, of all kinds together.
  void awaitTaking(int rank, uint64_t messages);
  // A number that the ranks of this host have in common: the lowest rank among this one and its neighbours.
  int host() const;
  bool reaches(int rank) const {
    return bells_[rank] != nullptr;
  }
  // Whether every other rank is a neighbour.
  bool reachesAll() const {
    return reachesAll_;
  }
  // To be called where all ranks reach all: then whoever sends here also rings.
  void ringEachOther() {
    allRing_ = true;
  }
  bool allRing() const {
    return allRing_;
  }
  // The neighbours whose processes have ended since the last call.
  std::vector<int> takeEnded();
  // Any thread: whether the process of that rank has ended, or does within the limit.
  bool hasEnded(int rank, std::chrono::milliseconds limit) const;

 private:
  struct Taken;
  struct Page;
  bool reach(int rank, const std::string& address);

  int self_ = -1;
  int file_ = -1;
  Page* own_ = nullptr;
  int watch_ = -1; // epoll of the neighbours' process descriptors
  bool reachesAll_ = false;
  bool allRing_ = false;
  std::vector<BellWord*> bells_;        // by rank; null for this one and for those that cannot be reached
  std::vector<Page*> pages_;            // mapped, by rank; null for none
  std::vector<OtherProcess> processes_; // by rank; none for those that cannot be reached
  std::vector<int> looksAt_;            // the ranks alive that have no process descriptor; of takeEnded()
};

} // namespace torch_rpc_mpi
