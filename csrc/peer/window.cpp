#include "peer/window.h"

#include <algorithm>

namespace torch_rpc_mpi {

bool Window::fits(Channel channel) {
  const size_t untaken = of(channel).untaken();
  return 2 * untaken + budget_.untaken_ < budget_.budget_ ||
      (untaken == 0 && budget_.untaken_ < budget_.budget_ + budget_.budget_ / 4);
}

bool Window::allows(ProgressToken& token, Channel channel) {
  if (!bounded_ || fits(channel)) {
    return true;
  }
  look(token);
  if (!bounded_ || fits(channel)) {
    return true;
  }
  budget_.look(token);
  return fits(channel);
}

void Window::posted(Channel channel) {
  if (!bounded_) {
    return;
  }
  ++of(channel).posted;
  ++budget_.untaken_;
  if (!listed_) {
    listed_ = true;
    budget_.windows_.push_back(this);
  }
}

void Window::await(ProgressToken& token) {
  const auto& [frames, chunks] = counts_;
  const size_t untaken = frames.untaken() + chunks.untaken();
  transport_.awaitTaking(token, rank_, frames.taken + chunks.taken + (untaken + 1) / 2);
}

void Window::look(ProgressToken& token) {
  for (const Channel channel : {Channel::kFrame, Channel::kBulk}) {
    Count& count = of(channel);
    const auto taken = transport_.taken(token, rank_, channel);
    bounded_ = taken.has_value();
    const uint64_t now = std::clamp(taken.value_or(count.posted), count.taken, count.posted);
    budget_.untaken_ -= now - count.taken;
    count.taken = now;
  }
}

void WindowBudget::look(ProgressToken& token) {
  std::erase_if(windows_, [&](Window* window) {
    window->look(token);
    window->listed_ = std::ranges::any_of(window->counts_, [](const auto& count) { return count.untaken() > 0; });
    return !window->listed_;
  });
}

} // namespace torch_rpc_mpi
