#include "host/other_process.h"

#include <algorithm>
#include <cerrno>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace torch_rpc_mpi {

namespace {

constexpr auto kPollInterval = std::chrono::milliseconds(2);

// Of proc_pid_stat(5), counted from 1.
constexpr int kState = 3, kFlags = 9, kThreads = 20, kStarted = 22;
constexpr unsigned long kExiting = 4; // PF_EXITING: it lets go of its memory, and ends when that is done

struct Stat {
  bool exists = false;
  bool exiting = false;
  uint64_t started = 0; // in ticks since the system's start
};

// Nothing if this cannot be told, for want of descriptors, say.
std::optional<Stat> statOf(pid_t pid) {
  const int file = open(("/proc/" + std::to_string(pid) + "/stat").c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    return errno == ENOENT ? std::optional(Stat()) : std::nullopt;
  }
  char buffer[1024];
  const ssize_t bytes = read(file, buffer, sizeof(buffer));
  const int error = errno;
  close(file);
  if (bytes < 0) {
    return error == ESRCH ? std::optional(Stat()) : std::nullopt;
  }
  const std::string text(buffer, static_cast<size_t>(bytes));
  std::istringstream fields(text.substr(std::min(text.rfind(')') + 1, text.size()))); // the name may hold anything
  Stat stat;
  std::string field;
  char state = 0;
  long threads = 0;
  for (int number = kState; number <= kStarted && fields >> field; ++number) {
    if (number == kState) {
      state = field[0];
    } else if (number == kFlags) {
      stat.exiting = (std::stoul(field) & kExiting) != 0;
    } else if (number == kThreads) {
      threads = std::stol(field);
    } else if (number == kStarted) {
      stat.started = std::stoull(field);
    }
  }
  if (stat.started == 0) {
    return std::nullopt;
  }
  // A zombie has ended, unless it is but the first of several threads.
  stat.exists = (state != 'Z' && state != 'X') || threads > 1;
  return stat;
}

} // namespace

OtherProcess::OtherProcess(pid_t pid) : descriptor_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))), pid_(pid) {
  if (descriptor_ < 0) {
    started_ = statOf(pid).value_or(Stat()).started;
  }
}

OtherProcess::~OtherProcess() {
  if (descriptor_ >= 0) {
    close(descriptor_);
  }
}

OtherProcess::OtherProcess(OtherProcess&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      pid_(std::exchange(other.pid_, 0)),
      started_(other.started_) {}

OtherProcess& OtherProcess::operator=(OtherProcess&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(pid_, other.pid_);
  std::swap(started_, other.started_);
  return *this;
}

bool OtherProcess::ended() const {
  if (descriptor_ >= 0) {
    pollfd process{descriptor_, POLLIN, 0};
    return ::poll(&process, 1, 0) > 0;
  }
  const auto stat = statOf(pid_);
  return stat && (!stat->exists || stat->started != started_);
}

bool OtherProcess::hasEnded(std::chrono::milliseconds limit) const {
  if (pid_ == 0) {
    return false;
  }
  const auto end = std::chrono::steady_clock::now() + limit;
  for (;;) {
    if (ended() || (limit.count() > 0 && statOf(pid_).value_or(Stat()).exiting)) {
      return true;
    }
    if (std::chrono::steady_clock::now() >= end) {
      return false;
    }
    std::this_thread::sleep_for(kPollInterval);
  }
}

} // namespace torch_rpc_mpi
