#include "host/termination.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <utility>

#include <unistd.h>

#include "host/launcher_output.h"

namespace torch_rpc_mpi {

namespace {

std::atomic<bool> inUse{false};
// What the handler uses, which may run when an object has just been cancelled: written only while it is not installed.
std::array<char, 1024> notice;
size_t noticeBytes = 0;
pid_t owner = 0;

// Async-signal-safe.
void onTermination(int number) {
  const int error = errno;
  if (getpid() == owner) {
    if (write(STDERR_FILENO, notice.data(), noticeBytes) > 0) {
      waitUntilRead(STDERR_FILENO);
    }
  }
  struct sigaction byDefault{};
  byDefault.sa_handler = SIG_DFL;
  sigaction(number, &byDefault, nullptr);
  kill(getpid(), number); // which takes effect when this returns
  errno = error;
}

} // namespace

TerminationNotice::TerminationNotice(std::string_view line) {
  struct sigaction current{};
  if (sigaction(SIGTERM, nullptr, &current) != 0 || (current.sa_flags & SA_SIGINFO) != 0 ||
      current.sa_handler != SIG_DFL || inUse.exchange(true)) {
    return;
  }
  noticeBytes = std::min(line.size(), notice.size() - 1);
  std::copy_n(line.begin(), noticeBytes, notice.begin());
  notice[noticeBytes++] = '\n';
  owner = getpid();
  active_ = true;
  struct sigaction ours{};
  ours.sa_handler = onTermination;
  ours.sa_flags = SA_RESTART;
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
  if (sigaction(SIGTERM, nullptr, &current) == 0 && (current.sa_flags & SA_SIGINFO) == 0 &&
      current.sa_handler == onTermination) {
    struct sigaction byDefault{};
    byDefault.sa_handler = SIG_DFL;
    sigaction(SIGTERM, &byDefault, nullptr);
  }
  inUse = false;
}

} // namespace torch_rpc_mpi
