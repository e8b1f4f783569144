#include "peer/credit.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kForLargeOnes = 1; // requests beyond the window

} // namespace

bool Credit::allows(uint64_t bytes) const {
  const uint64_t requestsOut = sentRequests_.load() - ackedRequests_.load();
  const uint64_t bytesOut = sentBytes_.load() - ackedBytes_.load();
  if (bytes == 0) {
    return requestsOut < windowRequests_;
  }
  return requestsOut < windowRequests_ + kForLargeOnes && (bytesOut == 0 || bytesOut + bytes <= windowBytes_);
}

void Credit::sent(uint64_t bytes) {
  sentRequests_.fetch_add(1);
  sentBytes_.fetch_add(bytes);
}

void Credit::notSent(uint64_t bytes) {
  sentRequests_.fetch_sub(1);
  sentBytes_.fetch_sub(bytes);
}

std::string Credit::acknowledged(const FrameHeader& header) {
  // Frames keep their order, so what is reported never goes back.
  const auto possible = [](uint64_t reported, uint64_t before, uint64_t sent) {
    return reported >= before && reported <= sent;
  };
  if (!possible(header.releasedRequests, ackedRequests_, sentRequests_) ||
      !possible(header.releasedBytes, ackedBytes_, sentBytes_)) {
    return "it acknowledges " + std::to_string(header.releasedRequests) + " requests of " +
        std::to_string(header.releasedBytes) + " bytes, but was sent " + std::to_string(sentRequests_) + " of " +
        std::to_string(sentBytes_) + " and had acknowledged " + std::to_string(ackedRequests_) + " of " +
        std::to_string(ackedBytes_);
  }
  ackedRequests_ = header.releasedRequests;
  ackedBytes_ = header.releasedBytes;
  return {};
}

bool Credit::released(uint64_t bytes) {
  const uint64_t allRequests = releasedRequests_.fetch_add(1) + 1;
  const uint64_t allBytes = releasedBytes_.fetch_add(bytes) + bytes;
  // Signed: another thread may have released more meanwhile, and the peer been told of it.
  const auto untoldRequests = static_cast<int64_t>(allRequests - toldRequests_);
  const auto untoldBytes = static_cast<int64_t>(allBytes - toldBytes_);
  const bool much = untoldRequests >= static_cast<int64_t>(windowRequests_ / 2) ||
      untoldBytes >= static_cast<int64_t>(windowBytes_ / 2);
  return much && !due_.exchange(true);
}

void Credit::report(FrameHeader& header) {
  header.releasedRequests = releasedRequests_.load();
  header.releasedBytes = releasedBytes_.load();
  toldRequests_ = header.releasedRequests;
  toldBytes_ = header.releasedBytes;
}

bool Credit::unreported() const {
  return releasedRequests_ != toldRequests_ || releasedBytes_ != toldBytes_;
}

bool Credit::stale() {
  const uint64_t released = releasedRequests_;
  const bool stale = released == releasedAtLook_ && unreported();
  releasedAtLook_ = released;
  return stale;
}

} // namespace torch_rpc_mpi
