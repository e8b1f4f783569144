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
  const std::lock_guard<std::mutex> lock(all_->mutex_);
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
  const std::lock_guard<std::mutex> lock(all_->mutex_);
  all_->promisedByCall_[{peer_, callId_}] = this; // before what needs no memory
  append();
}

void RunningRequests::Request::append() {
  List& list = all_->listOf(*this);
  previous_ = list.last;
  (previous_ == nullptr ? list.first : previous_->next_) = this;
  list.last = this;
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
  List& list = all->listOf(*this);
  (previous_ == nullptr ? list.first : previous_->next_) = next_;
  (next_ == nullptr ? list.last : next_->previous_) = previous_;
  if (promised_) {
    all->promisedByCall_.erase({peer_, callId_});
  }
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

void RunningRequests::forEach(c10::function_ref<void(const Request&)> look) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const List* list : {&withThread_, &promised_}) {
    for (const Request* request = list->first; request != nullptr; request = request->next_) {
      look(*request);
    }
  }
}

void RunningRequests::oldest(c10::function_ref<void(const Request&)> look) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (withThread_.first != nullptr) {
    look(*withThread_.first);
  }
}

void RunningRequests::find(int peer, uint64_t callId, c10::function_ref<void(const Request&)> look) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto found = promisedByCall_.find({peer, callId}); found != promisedByCall_.end()) {
    look(*found->second);
    return;
  }
  for (const Request* request = withThread_.first; request != nullptr; request = request->next_) {
    if (request->peer_ == peer && request->callId_ == callId) {
      look(*request);
      return;
    }
  }
}

} // namespace torch_rpc_mpi
