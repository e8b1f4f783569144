#include "agent/flight_log.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <utility>

#include <c10/util/Logging.h>

namespace torch_rpc_mpi {

namespace {

constexpr int kSignal = SIGUSR2;
std::atomic<bool> signalled{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set in the handler of a signal");

void onSignal(int) {
  signalled = true; // the engine looks at each of its turns
}

bool hasDefaultAction() {
  struct sigaction now{};
  return sigaction(kSignal, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) == 0 && now.sa_handler == SIG_DFL;
}

} // namespace

FlightLog::FlightLog(std::string directory, std::string baseName, NameOf nameOf, Describe describe)
    : directory_(std::move(directory)),
      baseName_(std::move(baseName)),
      nameOf_(std::move(nameOf)),
      describe_(std::move(describe)) {
  if (!directory_.empty() && hasDefaultAction()) {
    struct sigaction action{};
    action.sa_handler = onSignal;
    action.sa_flags = SA_RESTART;
    ownsSignal_ = sigaction(kSignal, &action, nullptr) == 0;
  }
}

FlightLog::~FlightLog() {
  struct sigaction now{};
  if (ownsSignal_ && sigaction(kSignal, nullptr, &now) == 0 && now.sa_handler == onSignal) {
    now.sa_handler = SIG_DFL;
    (void)sigaction(kSignal, &now, nullptr);
  }
}

void FlightLog::note(const char* what, int peer) noexcept {
  if (directory_.empty()) {
    return;
  }
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto now = Clock::now();
    if (due_ || files_ == kFiles || (files_ > 0 && now - lastWritten_ < kBetween)) {
      return;
    }
    why_ = what + nameOf_(peer);
    due_ = true;
  } catch (const std::bad_alloc&) {
  }
}

bool FlightLog::due() const noexcept {
  return due_.load(std::memory_order_relaxed) || (ownsSignal_ && signalled.load(std::memory_order_relaxed));
}

void FlightLog::write() noexcept {
  std::string why;
  try {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const bool asked = ownsSignal_ && signalled.exchange(false);
      if (!due_.exchange(false) && !asked) {
        return;
      }
      why = std::exchange(why_, {});
      why = why.empty() ? "SIGUSR2" : why;
    }
    (void)write(why, {});
  } catch (const std::exception& error) {
    LOG(WARNING) << "The flight recorder's file for \"" << why << "\" could not be written: " << error.what();
  }
}

std::string FlightLog::nextPath() {
  const std::lock_guard<std::mutex> lock(mutex_);
  lastWritten_ = Clock::now();
  return directory_ + "/" + baseName_ + "-" + std::to_string(++files_) + ".json";
}

// Whoever waits for the file finds all of it.
std::string FlightLog::write(const std::string& why, const std::string& path) {
  if (path.empty() && directory_.empty()) {
    throw std::runtime_error(
        "no path was given, and there is no directory for files of the flight recorder: set the option "
        "flight_recorder_dir, or TORCH_RPC_MPI_FLIGHT_RECORDER_DIR");
  }
  const std::string text = describe_(why);
  const std::string to = path.empty() ? nextPath() : path;
  const std::string part = to + ".part";
  {
    std::ofstream file(part, std::ios::binary);
    file << text;
    file.close();
    if (!file || std::rename(part.c_str(), to.c_str()) != 0) {
      const int code = errno;
      (void)std::remove(part.c_str());
      throw std::runtime_error("cannot write " + to + ": " + std::strerror(code));
    }
  }
  return to;
}

} // namespace torch_rpc_mpi
