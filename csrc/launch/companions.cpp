#include "launch/companions.h"

#include <stdexcept>
#include <thread>
#include <utility>

namespace torch_rpc_mpi {

namespace {

constexpr auto kLookInterval = std::chrono::milliseconds(20);
constexpr auto kGrace = std::chrono::milliseconds(300);

} // namespace

Companions::Companions(std::vector<Member> members) {
  members_.reserve(members.size());
  for (Member& member : members) {
    members_.push_back({OtherProcess(member.pid), std::move(member.name)});
  }
}

std::optional<std::string> Companions::ended(std::chrono::milliseconds limit) {
  const auto end = Clock::now() + limit;
  for (;;) {
    const auto name = look();
    if (name || Clock::now() >= end) {
      return name;
    }
    std::this_thread::sleep_for(kLookInterval);
  }
}

std::optional<std::string> Companions::look() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto now = Clock::now();
  if (!found_ && now >= nextLook_) {
    nextLook_ = now + kLookInterval;
    for (const Watched& member : members_) {
      if (member.process.hasEnded()) {
        found_ = {member.name, now};
        break;
      }
    }
  }
  return found_ && now - found_->at >= kGrace ? std::optional(found_->name) : std::nullopt;
}

void Companions::check(std::chrono::milliseconds limit) {
  if (const auto name = ended(limit)) {
    throw std::runtime_error(
        "init_rpc failed because " + *name +
        " has ended while the group formed (it crashed or was killed). See its output for the reason");
  }
}

} // namespace torch_rpc_mpi
