// MPI_Init waits for late ranks without a limit, and inside mpi4py it holds the GIL: only a thread without Python can
// say that it takes long.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "launch/companions.h"
#include "python/second_interrupt.h"

namespace torch_rpc_mpi {

// Members: mutex_ guards cancelled_; the rest is immutable.
class InitWatchdog {
 public:
  // With the GIL. After warnAfter seconds it says on stderr what is being waited for, and again at growing intervals;
  // after abortAfter seconds (0: never) it ends the process with exit status 1, since a blocked MPI_Init cannot be left
  // in any other way. So it does when one of the companions (null: none are known) has ended, and so does a second
  // Ctrl-C, see Note [A second Ctrl-C]. world: whose files go with it, see removeSharedFiles(); empty for none.
  InitWatchdog(
      std::string what,
      double warnAfter,
      double abortAfter,
      std::shared_ptr<Companions> companions,
      std::string world);
  ~InitWatchdog();
  void cancel();

 private:
  void watch();
  [[noreturn]] void endProcess(const std::string& why) const;
  const std::string what_;
  const std::chrono::duration<double> warnAfter_;
  const std::chrono::duration<double> abortAfter_;
  const std::shared_ptr<Companions> companions_;
  const std::string world_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool cancelled_ = false;
  SecondInterrupt secondInterrupt_;
  std::thread thread_;
};

} // namespace torch_rpc_mpi
