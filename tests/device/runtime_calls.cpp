#include "runtime_calls.h"

#include <utility>

#include "captures.h"
#include "devices.h"
#include "streams.h"

namespace rpctest {

namespace {

thread_local int lastError = kSuccess;

std::array<std::atomic<int64_t>, 4> counts{};

} // namespace

int result(int error) {
  if (error != kSuccess) {
    lastError = error;
  }
  return error;
}

int takeLastError() {
  return std::exchange(lastError, kSuccess);
}

int enter() {
  if (inBadFork()) {
    return kInitializationError;
  }
  if (currentDevice() >= deviceCount()) {
    return kInvalidDevice;
  }
  touch(currentDevice());
  return kSuccess;
}

int enterWhereNothingCaptures() {
  const int error = enter();
  return error != kSuccess ? error : checkNoCapture();
}

void synchronizeAll() {
  countSynchronization();
  for (int device = 0; device < deviceCount(); ++device) {
    synchronizeDevice(device);
  }
}

int64_t live(Counted what) {
  return counts[static_cast<size_t>(what)];
}

int counted(Counted what, int change, int error) {
  if (error == kSuccess) {
    counts[static_cast<size_t>(what)] += change;
  }
  return error;
}

} // namespace rpctest
