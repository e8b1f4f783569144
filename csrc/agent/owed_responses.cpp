#include "agent/owed_responses.h"

#include <algorithm>
#include <new>

namespace torch_rpc_mpi {

namespace {

// Callers that are told; others get their timeouts.
constexpr size_t kOwed = 1024;

} // namespace

OwedResponses::OwedResponses() {
  owed_.reserve(kOwed);
  paying_.reserve(kOwed);
}

void OwedResponses::add(ReplyTo reply) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (owed_.size() < owed_.capacity()) {
    owed_.push_back(reply);
    any_ = true;
  }
}

void OwedResponses::pay(c10::function_ref<void(ReplyTo reply)> tell) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    any_ = false;
    paying_.swap(owed_);
  }
  while (!paying_.empty()) {
    try {
      tell(paying_.back());
      paying_.pop_back();
    } catch (const std::bad_alloc&) {
      break;
    }
  }
  // No more than fit: without memory there can be no more.
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t kept = std::min(owed_.capacity() - owed_.size(), paying_.size());
  owed_.insert(owed_.end(), paying_.begin(), paying_.begin() + static_cast<ptrdiff_t>(kept));
  paying_.clear();
}

void OwedResponses::again() {
  const std::lock_guard<std::mutex> lock(mutex_);
  any_ = !owed_.empty();
}

} // namespace torch_rpc_mpi
