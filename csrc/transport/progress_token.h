// The right to call the transport, as a type: functions that touch MPI take a ProgressToken&, and only the holder of a
// TokenHold has one to pass.
#pragma once

#include <atomic>
#include <mutex>

namespace torch_rpc_mpi {

class ProgressToken {
 public:
  ProgressToken(const ProgressToken&) = delete;
  ProgressToken& operator=(const ProgressToken&) = delete;

 private:
  friend class TokenHold;
  friend class TokenSource;
  ProgressToken() = default;
};

// One per engine. Nobody ever blocks on it: who does not get it leaves its work in a queue for the holder.
class TokenSource {
 public:
  TokenSource() = default;

 private:
  friend class TokenHold;
  std::atomic<bool> held_{false};
  ProgressToken token_;
};

class TokenHold {
 public:
  explicit TokenHold(TokenSource& source)
      : source_(!source.held_.load() && !source.held_.exchange(true) ? &source : nullptr) {}
  ~TokenHold() {
    release();
  }
  TokenHold(const TokenHold&) = delete;
  TokenHold& operator=(const TokenHold&) = delete;

  explicit operator bool() const {
    return source_ != nullptr;
  }
  ProgressToken& operator*() const {
    return source_->token_;
  }
  // Sequentially consistent, so that the holder's next look at a queue sees what was queued by a thread that failed to
  // get the token before this.
  void release() {
    if (source_ != nullptr) {
      source_->held_.store(false);
      source_ = nullptr;
    }
  }

 private:
  TokenSource* source_;
};

} // namespace torch_rpc_mpi
