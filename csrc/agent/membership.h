// The workers of the group, and those of them that were lost.
#pragma once

#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/rpc/rpc_agent.h>

namespace torch_rpc_mpi {

// Of one rank.
struct GroupMember {
  std::string name;
  std::string host;
};

// Thread-safe: mutex_ guards lost_, of which lostCount_ is a hint; the rest is immutable.
class Membership {
 public:
  using WorkerInfo = torch::distributed::rpc::WorkerInfo;
  struct Loss {
    int rank;
    std::string reason;
    std::string cause; // the reason, or that of the loss because of which this worker has left
  };

  Membership(int rank, const std::vector<GroupMember>& members);

  int rank() const { // this worker's
    return rank_;
  }
  const WorkerInfo& self() const {
    return workers_[rank_];
  }
  const std::string& host() const {
    return hosts_[rank_];
  }
  const std::vector<WorkerInfo>& workers() const {
    return workers_;
  }
  // Both throw c10::Error for a worker that there is not.
  const WorkerInfo& find(const std::string& name) const;
  const WorkerInfo& find(torch::distributed::rpc::worker_id_t id) const;
  // The worker in the words of an error.
  std::string describe(int rank) const;

  // It has left or failed: calls to it can no longer be answered. The first reason for each rank sticks.
  void lose(int rank, const std::string& reason, const std::string& cause);
  std::optional<std::string> whyLost(int rank) const;
  // In the order in which they were lost.
  std::vector<Loss> lost() const;

 private:
  const int rank_;
  std::vector<WorkerInfo> workers_;
  std::vector<std::string> hosts_;
  std::unordered_map<std::string, int> ranksByName_;

  mutable std::mutex mutex_;
  std::vector<Loss> lost_;
  std::atomic<size_t> lostCount_{0};
};

} // namespace torch_rpc_mpi
