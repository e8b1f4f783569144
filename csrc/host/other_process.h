// Another process of this host, whose end can be seen.
#pragma once

#include <chrono>
#include <cstdint>

#include <sys/types.h>

namespace torch_rpc_mpi {

// What has happened to one that is found to have ended, a clause about it.
inline constexpr const char* kEndedWithoutLeaving = "its process has ended without leaving (it crashed or was killed)";

// By a descriptor of the process. Where the system gives none (Linux before 5.3, a filter of system calls), by what
// /proc says of the id and of when its process started, so that a later process of the same id is not taken for it.
//
// Immutable.
class OtherProcess {
 public:
  OtherProcess() = default; // none: it never ends
  // The one that has this id now.
  explicit OtherProcess(pid_t pid);
  ~OtherProcess();
  OtherProcess(OtherProcess&& other) noexcept;
  OtherProcess& operator=(OtherProcess&& other) noexcept;

  // Readable when the process has ended; -1 if there is none.
  int descriptor() const {
    return descriptor_;
  }
  // Whether it has ended. With a limit, whether it does so by then, or is about to: that may take it some time.
  bool hasEnded(std::chrono::milliseconds limit = std::chrono::milliseconds(0)) const;

 private:
  bool ended() const;

  int descriptor_ = -1;
  pid_t pid_ = 0;        // 0: there is none
  uint64_t started_ = 0; // where there is no descriptor
};

} // namespace torch_rpc_mpi
