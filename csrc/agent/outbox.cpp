#include "agent/outbox.h"

#include <new>
#include <utility>

namespace torch_rpc_mpi {

namespace {

constexpr size_t kKept = 1024; // messages; what a burst has needed beyond goes

} // namespace

void Outbox::encode(OutboundRpc& message) const {
  message.encode(exchange_.frames());
  message.dropSource();
}

void Outbox::submit(OutboundPtr message, bool expectsReply) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(message));
    filled_ = true;
  }
  engine_->submitted(expectsReply);
}

void Outbox::refuse(int peer, const std::string& why) noexcept {
  try {
    exchange_.refuse(peer, why);
    engine_->wake();
  } catch (const std::bad_alloc&) { // whoever waited for the message has been told all the same
  }
}

bool Outbox::post(ProgressToken& token, Clock::time_point lastTurn) {
  if (!filled()) {
    return false;
  }
  std::vector<OutboundPtr> queued = std::exchange(spare_, {});
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queued.swap(queue_);
    filled_ = false;
  }
  for (OutboundPtr& message : queued) {
    if (message->late(lastTurn)) {
      exchange_.drop(token, std::move(message)); // the call may have been given up already
    } else {
      exchange_.post(token, std::move(message));
    }
  }
  const bool any = !queued.empty();
  queued.clear();
  if (queued.capacity() <= kKept) {
    spare_ = std::move(queued);
  }
  return any;
}

} // namespace torch_rpc_mpi
