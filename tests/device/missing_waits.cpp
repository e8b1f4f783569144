#include "missing_waits.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>

#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <unistd.h>

namespace rpctest {

namespace {

constexpr int kFrames = 16;
constexpr int kPlaces = 3; // more would tell apart who sends what
constexpr const char* kEngine = "/torch_rpc_mpi/_C.";

// Never destroyed, as the streams.
struct Places {
  const char* log = getenv("RPCTEST_WAITS_LOG");
  const char* leftOut = getenv("RPCTEST_LEAVE_OUT");
  std::mutex mutex;
  std::set<std::string> logged; // under the lock, as what follows
  std::map<const Event*, std::string> records;

  bool wanted() const {
    return log != nullptr || leftOut != nullptr;
  }
};

Places& places() {
  static auto* all = new Places;
  return *all;
}

bool isIn(const Dl_info& info, const char* library) {
  return info.dli_fname != nullptr && std::string(info.dli_fname).find(library) != std::string::npos;
}

// Offsets in the engine's library, the innermost first; empty if the call is not the engine's but a program's.
std::string callers() {
  std::array<void*, kFrames> frames{};
  const int count = backtrace(frames.data(), kFrames);
  std::ostringstream text;
  int found = 0;
  for (int i = 1; i < count && found < kPlaces; ++i) {
    Dl_info info{};
    dladdr(frames[static_cast<size_t>(i)], &info);
    if (isIn(info, kEngine)) {
      const auto offset = static_cast<char*>(frames[static_cast<size_t>(i)]) - static_cast<char*>(info.dli_fbase);
      text << (found++ > 0 ? "+" : "") << std::hex << offset;
    } else if (
        found > 0 || !(isIn(info, "/rpctest.so") || isIn(info, "/libc10.so") || isIn(info, "/libtorch_cpu.so"))) {
      break;
    }
  }
  return text.str();
}

// Under the lock.
void log(const std::string& place) {
  if (places().log == nullptr || !places().logged.insert(place).second) {
    return;
  }
  const int file = open(places().log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  const std::string line = place + "\n";
  [[maybe_unused]] const ssize_t written = write(file, line.data(), line.size());
  close(file);
}

} // namespace

bool leavesOut(const char* call, const Event* queried) {
  if (!places().wanted()) {
    return false;
  }
  std::string place = callers();
  if (place.empty()) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(places().mutex);
  if (queried != nullptr) {
    place = places().records[queried];
  }
  place = std::string(call) + " " + place;
  log(place);
  return places().leftOut != nullptr && place == places().leftOut;
}

void noteRecord(const Event* event) {
  if (places().wanted()) {
    const std::string place = callers();
    const std::lock_guard<std::mutex> lock(places().mutex);
    places().records[event] = place;
  }
}

} // namespace rpctest
