// The processes of this host that are to form a group with this one, and whether one of them has ended meanwhile.
#pragma once

#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

#include "base/clock.h"
#include "host/other_process.h"

namespace torch_rpc_mpi {

// MPI waits for ever for a process that has ended, and says nothing of it; an agent's neighbours are not there yet.
//
// Thread-safe: mutex_ guards found_ and nextLook_, the rest is immutable.
class Companions {
 public:
  struct Member {
    pid_t pid;
    std::string name; // as errors have it
  };
  explicit Companions(std::vector<Member> members);

  // The name of one that has ended; nothing while all live, and for a moment longer: what it had sent may be all that
  // is waited for. With a limit, if one does so by then.
  std::optional<std::string> ended(std::chrono::milliseconds limit = std::chrono::milliseconds(0));
  // Throws std::runtime_error with that name.
  void check(std::chrono::milliseconds limit = std::chrono::milliseconds(0));

 private:
  struct Watched {
    OtherProcess process;
    std::string name;
  };
  struct Found {
    std::string name;
    Clock::time_point at;
  };

  std::optional<std::string> look();

  std::vector<Watched> members_;
  std::mutex mutex_;
  std::optional<Found> found_;
  Clock::time_point nextLook_{};
};

} // namespace torch_rpc_mpi
