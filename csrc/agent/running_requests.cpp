#include "agent/running_requests.h"

#include <algorithm>
#include <utility>

namespace torch_rpc_mpi {

namespace {

thread_local RunningRequests::Request* ofThisThread = nullptr;

} // namespace

RunningRequests::Request::Request(RunningRequests& all, int peer, uint64_t callId)
    : all_(&all),
      peer_(peer),
      callId_(callId),
      since_(Clock::now()),
      promised_(false) {
  append();
  ofThisThread = this;
}

RunningRequests::Request::Request(const Request& before)
    : all_(before.all_),
      peer_(before.peer_),
      callId_(before.callId_),
      since_(before.since_),
      promised_(true) {
  const std::string_view name = before.function();
  std::ranges::copy(name, function_.begin());
  functionBytes_ = name.size();
  append();
}

void RunningRequests::Request::append() {
  const std::lock_guard<std::mutex> lock(all_->mutex_);
  previous_ = all_->last_;
  (previous_ == nullptr ? all_->first_ : previous_->next_) = this;
  all_->last_ = this;
}

void RunningRequests::Request::end() {
  RunningRequests* const all = std::exchange(all_, nullptr);
  if (all == nullptr) {
    return;
  }
  if (!promised_) {
    ofThisThread = nullptr;
  }
  const std::lock_guard<std::mutex> lock(all->mutex_);
  (previous_ == nullptr ? all->first_ : previous_->next_) = next_;
  (next_ == nullptr ? all->last_ : next_->previous_) = previous_;
}

void RunningRequests::nameFunction(std::string_view module, std::string_view function) {
  Request* const request = ofThisThread;
  if (request == nullptr || request->functionBytes_.load(std::memory_order_relaxed) != 0) {
    return;
  }
  size_t bytes = 0;
  const auto append = [&](std::string_view text) {
    const size_t fits = std::min(text.size(), request->function_.size() - bytes);
    std::copy_n(text.begin(), fits, request->function_.begin() + static_cast<ptrdiff_t>(bytes));
    bytes += fits;
  };
  append(module);
  append(module.empty() ? "" : ".");
  append(function);
  request->functionBytes_.store(bytes, std::memory_order_release);
}

void RunningRequests::search(c10::function_ref<bool(const Request&)> look) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Request* request = first_; request != nullptr && !look(*request); request = request->next_) {
  }
}

} // namespace torch_rpc_mpi
