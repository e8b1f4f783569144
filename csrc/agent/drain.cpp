#include "agent/drain.h"

namespace torch_rpc_mpi {

Drain::Drain(int rank, int size, Send send) : rank_(rank), size_(size), send_(std::move(send)) {}

void Drain::join() {
  joined_ = true;
}

void Drain::withdraw() {
  joined_ = false;
  outdated_ = outdated_ || reported_;
}

void Drain::tell(ProgressToken& token, int peer, Kind kind, const DrainCounts& counts) {
  const Body body{kind, 0, counts};
  send_(token, peer, std::string(reinterpret_cast<const char*>(&body), sizeof(body)));
}

std::string Drain::onFrame(ProgressToken& token, int source, ConstSpan bytes) {
  Body body{};
  if (bytes.bytes != sizeof(body)) {
    return "a drain frame of " + std::to_string(bytes.bytes) + " bytes";
  }
  std::memcpy(&body, bytes.data, sizeof(body));
  const int child = source - 2 * rank_ - 1;
  const bool ofChild = child == 0 || child == 1;
  if (body.kind == Kind::kReport && ofChild && !children_[child]) {
    children_[child] = body.counts;
  } else if ((body.kind == Kind::kAgain || body.kind == Kind::kDone) && source == parent() && reported_) {
    conclude(token, body.kind);
  } else {
    return "a drain frame of kind " + std::to_string(static_cast<uint32_t>(body.kind)) + " out of turn";
  }
  return {};
}

void Drain::advance(ProgressToken& token, bool idle, const DrainCounts& own) {
  if (!joined_ || reported_ || !idle) {
    return;
  }
  DrainCounts total = own;
  for (int child = 0; child < 2; ++child) {
    if (2 * rank_ + 1 + child >= size_) {
      continue;
    }
    if (!children_[child]) {
      return;
    }
    total.sent += children_[child]->sent;
    total.received += children_[child]->received;
  }
  if (rank_ != 0) {
    reported_ = true;
    tell(token, parent(), Kind::kReport, total);
    return;
  }
  const bool balanced = total.sent == total.received;
  const bool settled = balanced && lastTotal_ == total.sent;
  lastTotal_ = balanced ? std::optional<uint64_t>(total.sent) : std::nullopt;
  conclude(token, settled ? Kind::kDone : Kind::kAgain);
}

void Drain::conclude(ProgressToken& token, Kind verdict) {
  for (int child = 2 * rank_ + 1; child <= 2 * rank_ + 2 && child < size_; ++child) {
    tell(token, child, verdict);
  }
  reported_ = false;
  children_ = {};
  const bool outdated = std::exchange(outdated_, false);
  if (verdict == Kind::kDone) {
    lastTotal_.reset();
    if (outdated) {
      missed_ = true;
    } else {
      joined_ = false;
      ++generation_;
    }
  }
}

} // namespace torch_rpc_mpi
