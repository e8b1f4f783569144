#include "agent/drain.h"

namespace torch_rpc_mpi {

Drain::Drain(int rank, int size, Send send) : rank_(rank), size_(size), send_(std::move(send)) {}

void Drain::tell(ProgressToken& token, int peer, Kind kind, uint64_t sent, uint64_t received) {
  const Body body{kind, 0, sent, received};
  send_(token, peer, std::string(reinterpret_cast<const char*>(&body), sizeof(body)));
}

void Drain::onFrame(ProgressToken& token, int source, ConstSpan bytes) {
  Body body{};
  if (bytes.bytes != sizeof(body)) {
    return;
  }
  std::memcpy(&body, bytes.data, sizeof(body));
  if (body.kind == Kind::kReport) {
    const int child = source - 2 * rank_ - 1;
    if (child == 0 || child == 1) {
      children_[child] = body;
    }
  } else {
    conclude(token, body.kind);
  }
}

void Drain::advance(ProgressToken& token, bool idle, uint64_t sent, uint64_t received) {
  if (!joined_ || reported_ || !idle) {
    return;
  }
  for (int child = 0; child < 2; ++child) {
    if (2 * rank_ + 1 + child >= size_) {
      continue;
    }
    if (!children_[child]) {
      return;
    }
    sent += children_[child]->sent;
    received += children_[child]->received;
  }
  if (rank_ != 0) {
    reported_ = true;
    tell(token, (rank_ - 1) / 2, Kind::kReport, sent, received);
    return;
  }
  const bool balanced = sent == received;
  const bool settled = balanced && lastTotal_ == sent;
  lastTotal_ = balanced ? std::optional<uint64_t>(sent) : std::nullopt;
  conclude(token, settled ? Kind::kDone : Kind::kAgain);
}

void Drain::conclude(ProgressToken& token, Kind verdict) {
  for (int child = 2 * rank_ + 1; child <= 2 * rank_ + 2 && child < size_; ++child) {
    tell(token, child, verdict);
  }
  reported_ = false;
  children_ = {};
  if (verdict == Kind::kDone) {
    joined_ = false;
    lastTotal_.reset();
    ++generation_;
  }
}

} // namespace torch_rpc_mpi
