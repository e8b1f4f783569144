#include "peer/credits.h"

namespace torch_rpc_mpi {

namespace {

constexpr auto kStale = std::chrono::microseconds(300); // longer than most calls take, whose responses report as well

} // namespace

Credits::Credits(int peers, size_t windowRequests, size_t windowBytes)
    : windowRequests_(windowRequests),
      windowBytes_(windowBytes) {
  for (int rank = 0; rank < peers; ++rank) {
    peers_.push_back(std::make_unique<Peer>());
  }
}

bool Credits::allows(int rank, uint64_t bytes) const {
  const Peer& peer = *peers_[rank];
  const uint64_t requestsOut = peer.sentRequests.load() - peer.ackedRequests.load();
  const uint64_t bytesOut = peer.sentBytes.load() - peer.ackedBytes.load();
  return requestsOut < windowRequests_ && (bytes == 0 || bytesOut == 0 || bytesOut + bytes <= windowBytes_);
}

void Credits::sent(int rank, uint64_t bytes) {
  peers_[rank]->sentRequests.fetch_add(1);
  peers_[rank]->sentBytes.fetch_add(bytes);
}

void Credits::acknowledged(int rank, const FrameHeader& header) {
  peers_[rank]->ackedRequests = header.releasedRequests;
  peers_[rank]->ackedBytes = header.releasedBytes;
}

void Credits::released(int rank, uint64_t bytes) {
  Peer& peer = *peers_[rank];
  const uint64_t allRequests = peer.releasedRequests.fetch_add(1) + 1;
  const uint64_t allBytes = peer.releasedBytes.fetch_add(bytes) + bytes;
  // Signed: another thread may have released more meanwhile, and the peer been told of it.
  const auto untoldRequests = static_cast<int64_t>(allRequests - peer.toldRequests);
  const auto untoldBytes = static_cast<int64_t>(allBytes - peer.toldBytes);
  const bool much = untoldRequests >= static_cast<int64_t>(windowRequests_ / 2) ||
      untoldBytes >= static_cast<int64_t>(windowBytes_ / 2);
  if (much && !peer.due.exchange(true)) {
    const std::lock_guard<std::mutex> lock(dueMutex_);
    duePeers_.push_back(rank);
    due_ = true;
  }
}

void Credits::report(int rank, FrameHeader& header) {
  Peer& peer = *peers_[rank];
  header.releasedRequests = peer.releasedRequests.load();
  header.releasedBytes = peer.releasedBytes.load();
  peer.toldRequests = header.releasedRequests;
  peer.toldBytes = header.releasedBytes;
}

bool Credits::unreported(int rank) const {
  const Peer& peer = *peers_[rank];
  return peer.releasedRequests != peer.toldRequests || peer.releasedBytes != peer.toldBytes;
}

std::vector<int> Credits::takeDue() {
  std::vector<int> due;
  if (hasDue()) {
    {
      const std::lock_guard<std::mutex> lock(dueMutex_);
      due.swap(duePeers_);
      due_ = false;
    }
    for (const int rank : due) {
      peers_[rank]->due = false;
    }
  }
  return due;
}

std::vector<int> Credits::takeStale(std::chrono::steady_clock::time_point now) {
  std::vector<int> stale;
  if (now >= nextLook_) {
    nextLook_ = now + kStale;
    for (size_t rank = 0; rank < peers_.size(); ++rank) {
      Peer& peer = *peers_[rank];
      const uint64_t released = peer.releasedRequests;
      if (released == peer.releasedAtLook && unreported(static_cast<int>(rank))) {
        stale.push_back(static_cast<int>(rank));
      }
      peer.releasedAtLook = released;
    }
  }
  return stale;
}

} // namespace torch_rpc_mpi
