#include "agent/join.h"

#include <utility>

#include "base/deadline.h"

namespace torch_rpc_mpi {

Join::Result Join::wait(const SignalService& signals, float seconds, bool last, const std::function<void()>& wake) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    agreed_ = false;
  }
  last_ = last;
  request_ = Request::kJoin;
  wake();
  std::unique_lock<std::mutex> lock(mutex_);
  const auto over = [this] { return agreed_ || !failure_.empty(); };
  try {
    (void)waitServing(signals, lock, changed_, deadlineAfter(seconds), over);
  } catch (...) { // thrown without the lock, by a signal's handler
    lock.lock();
    const bool agreed = agreed_;
    request_ = Request::kWithdraw;
    lock.unlock();
    if (agreed) {
      missed();
    }
    throw;
  }
  if (agreed_) {
    return Result::kAgreed;
  }
  request_ = Request::kWithdraw;
  return failure_.empty() ? Result::kTimedOut : Result::kFailed;
}

void Join::fail(const std::string& reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.empty()) {
    failure_ = reason;
  }
  changed_.notify_all();
}

std::string Join::failure() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

void Join::advance(
    ProgressToken& token,
    const std::function<bool()>& idle,
    const std::function<DrainCounts()>& counts) {
  if (request_.load(std::memory_order_relaxed) != Request::kNone) {
    const Request request = request_.exchange(Request::kNone);
    if (std::exchange(agreements_, drain_.agreements()) != drain_.agreements()) { // of a wait that was over
      missed();
    }
    drain_.withdraw(); // also of a wait that was over, and followed by this one, before it was seen
    if (request == Request::kJoin) {
      drain_.join();
    }
  }
  if (drain_.joined()) {
    drain_.advance(token, idle(), counts());
  }
  if (drain_.agreements() != agreements_) {
    agreements_ = drain_.agreements();
    std::unique_lock<std::mutex> lock(mutex_);
    agreed_ = request_ == Request::kNone; // else the wait that it belongs to is over
    const bool tooLate = !agreed_;
    changed_.notify_all();
    lock.unlock();
    if (tooLate) {
      missed();
    }
  }
  if (drain_.takeMissed()) {
    missed();
  }
}

void Join::missed() {
  if (last_) {
    fail("the other workers have agreed on an earlier graceful shutdown, which had timed out here, and have left");
  }
}

} // namespace torch_rpc_mpi
