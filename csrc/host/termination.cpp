#include "host/termination.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <utility>

#include <poll.h>
#include <unistd.h>

#include "host/launcher_output.h"

namespace torch_rpc_mpi {

namespace {

// For room on standard error, of which a reader that is stopped leaves none. The process is to end.
constexpr int kRoomLimit = 200; // milliseconds

std::atomic<bool> inUse{false}; // an object has the signal's effect
std::atomic<bool> said{false};  // its line was printed, or is being
// What the handler uses, which may run when an object has just been cancelled: written only while none is in use.
std::array<char, 1024> notice;
size_t noticeBytes = 0;
bool saidWhenParentEnds = true;
pid_t owner = 0;

bool hasRoom(int descriptor) {
  pollfd output{descriptor, POLLOUT, 0};
  return poll(&output, 1, kRoomLimit) == 1 && (output.revents & POLLOUT) != 0 && (output.revents & POLLERR) == 0;
}

void setDefault(int number) {
  struct sigaction byDefault{};
  byDefault.sa_handler = SIG_DFL;
  sigaction(number, &byDefault, nullptr);
}

// Async-signal-safe.
void onTermination(int number, siginfo_t* info, void* /*context*/) {
  const int error = errno;
  const bool isToSay = saidWhenParentEnds || info->si_pid != getppid();
  if (inUse && getpid() == owner && isToSay && !said.exchange(true) && hasRoom(STDERR_FILENO) &&
      write(STDERR_FILENO, notice.data(), noticeBytes) > 0) {
    waitUntilRead(STDERR_FILENO);
  }
  setDefault(number);
  kill(getpid(), number); // another thread takes it at once, or this one when it returns
  errno = error;
}

// A library that puts back what it found may have put ours back after its object was gone.
bool isOursOrDefault(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) == 0 ? action.sa_handler == SIG_DFL : action.sa_sigaction == onTermination;
}

} // namespace

TerminationNotice::TerminationNotice(std::string_view line, bool whenParentEnds) {
  struct sigaction current{};
  // The default effect does not end the first process of a container.
  if (getpid() == 1 || sigaction(SIGTERM, nullptr, &current) != 0 || !isOursOrDefault(current) || inUse.load()) {
    return;
  }
  noticeBytes = std::min(line.size(), notice.size() - 1);
  std::copy_n(line.begin(), noticeBytes, notice.begin());
  notice[noticeBytes++] = '\n';
  saidWhenParentEnds = whenParentEnds;
  owner = getpid();
  said = false;
  active_ = true;
  inUse = true;
  struct sigaction ours{};
  ours.sa_sigaction = onTermination;
  ours.sa_flags = SA_RESTART | SA_SIGINFO;
  sigaction(SIGTERM, &ours, nullptr);
}

TerminationNotice::~TerminationNotice() {
  cancel();
}

void TerminationNotice::cancel() noexcept {
  if (!std::exchange(active_, false)) {
    return;
  }
  struct sigaction current{};
  if (sigaction(SIGTERM, nullptr, &current) == 0 && isOursOrDefault(current)) {
    setDefault(SIGTERM);
  }
  inUse = false;
}

} // namespace torch_rpc_mpi
