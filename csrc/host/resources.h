// What of this machine this process may use: what its cgroup and its affinity allow, which is less than the host has
// wherever jobs or containers share one.
#pragma once

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <pthread.h>
#include <signal.h>

namespace torch_rpc_mpi {

// The tightest limits of this process's cgroup and of those that it lies in, of version 2 and version 1; nothing where
// there are none. `root`: where /proc and /sys lie, for tests.
struct CgroupLimits {
  std::optional<size_t> memoryBytes;
  std::optional<double> cores; // CPU time per time
  std::optional<size_t> tasks; // processes and threads, of all processes of the cgroup together
};
CgroupLimits cgroupLimits(const std::string& root = "");

// Bytes, at most what the host has.
size_t usableMemory(const std::string& root = "");
// Bytes of this process that are in memory now; 0 where unknown.
size_t residentMemory(const std::string& root = "");
// At least 1. A part of a core is one more: threads for all of the time that there is.
int usableCores(const std::string& root = "");

// Why no thread can be started for `what`: how many there are, and what limits them.
std::string noThreadText(const char* what);

// std::thread(body), with that as the error.
template <typename Body>
std::thread startThread(const char* what, Body&& body) {
  try {
    return std::thread(std::forward<Body>(body));
  } catch (const std::system_error&) {
    throw std::runtime_error(noThreadText(what));
  }
}

// The same, of a thread that serves no signals: they are left to those threads that would serve them without it.
template <typename Body>
std::thread startThreadWithoutSignals(const char* what, Body&& body) {
  struct Blocked {
    Blocked() {
      sigset_t all;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~Blocked() {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    sigset_t before{};
  };
  const Blocked blocked; // a new thread begins with its maker's mask
  return startThread(what, std::forward<Body>(body));
}

} // namespace torch_rpc_mpi
