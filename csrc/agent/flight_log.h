// The flight recorder's events, and what this worker is doing, as a file.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "base/clock.h"

namespace torch_rpc_mpi {

// Thread-safe: mutex_ guards the rest but for due_, an atomic; the options are immutable.
class FlightLog {
 public:
  // Whose text makes a file, and why it was made.
  using Describe = std::function<std::string(const std::string& why)>;
  using NameOf = std::function<std::string(int peer)>;

  // directory: empty for none; then nothing is due, and no signal is taken. baseName: of the files, without what
  // tells one from the next.
  FlightLog(std::string directory, std::string baseName, NameOf nameOf, Describe describe);
  ~FlightLog();
  FlightLog(const FlightLog&) = delete;
  FlightLog& operator=(const FlightLog&) = delete;

  // Any thread: something has gone wrong with a peer. A file is due then, unless one was written a moment ago, or
  // kFiles were.
  void note(const char* what, int peer) noexcept;
  // Whether a file is to be written, because of note() or of SIGUSR2.
  bool due() const noexcept;
  // Writes the one that is due.
  void write() noexcept;
  // Writes one now, to this path or else to the next in the directory. Returns the path. Throws std::runtime_error.
  std::string write(const std::string& why, const std::string& path);

  static constexpr int kFiles = 16; // of a session
  static constexpr std::chrono::seconds kBetween{1};

 private:
  std::string nextPath();

  const std::string directory_;
  const std::string baseName_;
  const NameOf nameOf_;
  const Describe describe_;
  bool ownsSignal_ = false;

  std::mutex mutex_;
  std::string why_; // of the file that is due
  int files_ = 0;
  Clock::time_point lastWritten_{};
  std::atomic<bool> due_{false};
};

} // namespace torch_rpc_mpi
