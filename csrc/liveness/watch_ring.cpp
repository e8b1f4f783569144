#include "liveness/watch_ring.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

namespace torch_rpc_mpi {

WatchRing::WatchRing(int self, std::vector<int> hosts)
    : self_(self),
      hosts_(std::move(hosts)),
      ring_(hosts_.size()),
      lost_(hosts_.size()) {
  std::map<int, int> found;
  std::vector<int> places(hosts_.size()); // of each rank among those of its host
  for (size_t rank = 0; rank < hosts_.size(); ++rank) {
    places[rank] = found[hosts_[rank]]++;
  }
  std::iota(ring_.begin(), ring_.end(), 0);
  std::ranges::sort(ring_, [&](int a, int b) { return std::tie(places[a], a) < std::tie(places[b], b); });
}

void WatchRing::lose(int rank) {
  lost_[rank] = true;
}

// Those that come after this rank, up to the next one that could be their watcher, and beyond that the ones which that
// one cannot watch because they are of its host.
std::vector<int> WatchRing::watched() const {
  std::vector<int> result;
  const size_t size = ring_.size();
  const size_t own = std::ranges::find(ring_, self_) - ring_.begin();
  std::vector<int> between; // the hosts of the ranks that are nearer, at most two that count
  for (size_t step = 1; step < size; ++step) {
    const int rank = ring_[(own + step) % size];
    if (lost_[rank]) {
      continue;
    }
    const int host = hosts_[rank];
    const bool hasNearer = std::ranges::any_of(between, [&](int other) { return other != host; });
    if (host != hosts_[self_] && !hasNearer) {
      result.push_back(rank);
    }
    if (std::ranges::find(between, host) == between.end()) {
      between.push_back(host);
    }
    if (between.size() > 1) { // everybody has one that is nearer than this
      break;
    }
  }
  std::ranges::sort(result);
  return result;
}

std::vector<int> WatchRing::besides(int rank) const {
  std::vector<int> result;
  for (int other = 0; other < static_cast<int>(hosts_.size()); ++other) {
    if (other != rank && hosts_[other] == hosts_[rank] && !lost_[other]) {
      result.push_back(other);
    }
  }
  return result;
}

bool WatchRing::speaksFor(int rank, const std::function<bool(int)>& lives) const {
  for (int other = 0; other < static_cast<int>(hosts_.size()); ++other) {
    if (other != rank && hosts_[other] == hosts_[rank] && (other == self_ || lives(other))) {
      return other == self_;
    }
  }
  return false;
}

} // namespace torch_rpc_mpi
