// Memory into which large tensors are received, kept for reuse.
//
// A fresh 64 MiB block costs 29 ms of page faults to fill, a used one 4 ms: the faults, not the copy, bound large
// transfers. Blocks of 2 MiB and more are asked to lie on huge pages.
#pragma once

#include <chrono>
#include <cstddef>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/clock.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards all members, and is not taken in a forked child, see Note [Locks in a forked child]. One
// per process and never destroyed, since tensors outlive the agent.
class ReceivePool {
 public:
  static ReceivePool& instance();
  // So many processes like this one run on the host: each keeps so much less.
  void shareBetween(int processes);
  explicit ReceivePool(size_t cap);
  ~ReceivePool();

  // 64-byte aligned at least. Throws NoMemory.
  void* allocate(size_t bytes);
  void release(void* block, size_t bytes);
  // Gives back to the system what has not been used since `before`.
  void trim(Clock::time_point before);
  size_t cachedBytes() const;
  // The size that is really taken for a request of `bytes`: at most a quarter more, or a (huge) page.
  static size_t classSize(size_t bytes);

 private:
  struct FreeBlock {
    void* block;
    Clock::time_point since;
  };
  mutable std::mutex mutex_;
  size_t cap_;
  size_t cached_ = 0;
  std::unordered_map<size_t, std::vector<FreeBlock>> free_; // by class size, oldest first
};

} // namespace torch_rpc_mpi
