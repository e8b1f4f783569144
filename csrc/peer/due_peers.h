// What any thread leaves for the token's holder: peers that are to be told of credit, and peers that are to fail.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards due_, of which any_ is a hint.
class DuePeers {
 public:
  void tellCredit(int rank) {
    const std::lock_guard<std::mutex> lock(mutex_);
    due_.credit.push_back(rank);
    any_ = true;
  }
  void refuse(int rank, const std::string& why) {
    const std::lock_guard<std::mutex> lock(mutex_);
    due_.refused.emplace_back(rank, why);
    any_ = true;
  }
  bool any() const {
    return any_.load(std::memory_order_relaxed);
  }

  struct Due {
    std::vector<int> credit;
    std::vector<std::pair<int, std::string>> refused; // and why
  };
  Due take() {
    if (!any()) {
      return {};
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    any_ = false;
    return std::exchange(due_, {});
  }

 private:
  std::mutex mutex_;
  Due due_;
  std::atomic<bool> any_{false};
};

} // namespace torch_rpc_mpi
