#include "agent/membership.h"

#include <algorithm>

namespace torch_rpc_mpi {

Membership::Membership(int rank, const std::vector<GroupMember>& members) : rank_(rank) {
  workers_.reserve(members.size());
  for (size_t each = 0; each < members.size(); ++each) {
    workers_.emplace_back(members[each].name, static_cast<int64_t>(each));
    hosts_.push_back(members[each].host);
    ranksByName_.emplace(members[each].name, static_cast<int>(each));
  }
}

const Membership::WorkerInfo& Membership::find(const std::string& name) const {
  const auto found = ranksByName_.find(name);
  TORCH_CHECK(
      found != ranksByName_.end(), describe(rank_), " could not find destination ", name,
      ". The workers of this group are: ", [&] {
        std::string names;
        for (const WorkerInfo& worker : workers_) {
          names += (names.empty() ? "" : ", ") + worker.name_;
        }
        return names;
      }());
  return workers_[found->second];
}

const Membership::WorkerInfo& Membership::find(torch::distributed::rpc::worker_id_t id) const {
  TORCH_CHECK(
      id >= 0 && static_cast<size_t>(id) < workers_.size(), describe(rank_), " could not find destination ", id,
      ". The workers of this group have the ids 0 to ", workers_.size() - 1);
  return workers_[id];
}

std::string Membership::describe(int rank) const {
  return c10::str("worker '", workers_[rank].name_, "' (rank ", rank, " on host ", hosts_[rank], ")");
}

void Membership::lose(int rank, const std::string& reason, const std::string& cause) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (std::none_of(lost_.begin(), lost_.end(), [rank](const Loss& loss) { return loss.rank == rank; })) {
    lost_.push_back({rank, reason, cause});
    lostCount_ = lost_.size();
  }
}

std::optional<std::string> Membership::whyLost(int rank) const {
  if (lostCount_.load(std::memory_order_relaxed) == 0) {
    return std::nullopt;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(lost_.begin(), lost_.end(), [rank](const Loss& loss) { return loss.rank == rank; });
  return found == lost_.end() ? std::nullopt : std::optional(found->reason);
}

std::vector<Membership::Loss> Membership::lost() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lost_;
}

} // namespace torch_rpc_mpi
