#include "host/launcher_output.h"

#include <thread>

#include <sys/ioctl.h>
#include <sys/stat.h>

namespace torch_rpc_mpi {

void waitUntilRead(int descriptor, std::chrono::milliseconds limit) {
  constexpr std::chrono::milliseconds kBetweenLooks{1};
  struct stat kind{};
  if (fstat(descriptor, &kind) != 0 || !S_ISFIFO(kind.st_mode)) {
    return;
  }
  const auto end = std::chrono::steady_clock::now() + limit;
  int unread = 0;
  while (ioctl(descriptor, FIONREAD, &unread) == 0 && unread != 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(kBetweenLooks);
  }
}

} // namespace torch_rpc_mpi
