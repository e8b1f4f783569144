// A communicator of the agent's own, so that its traffic never mixes with the user's.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/signal_service.h"
#include "mpi/mpi_library.h"

namespace torch_rpc_mpi {

// A rank did not take part in time; what() names the ranks that are missing.
class MissingRanks : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Used by one thread at a time: the one that forms the group, then the holder of the progress token.
//
// The destructor frees nothing: MPI_Comm_free is collective, and a communicator that was left behind on purpose must
// keep its context id, or stale messages would reach the next session.
class Communicator {
 public:
  // Collective over `parent` (the integer form that mpi4py gives). Waits at most `timeout` seconds, 0 for no limit.
  // Throws MissingRanks, MpiError, std::invalid_argument, and what a signal throws.
  static std::shared_ptr<Communicator> duplicate(
      std::shared_ptr<MpiLibrary> mpi,
      intptr_t parent,
      double timeout,
      const SignalService& signals);
  // Of `ranks` of the world, which has mpi4py's integer form `world`, in this order; only they call it. Others may be
  // idle or gone. Waits without a limit, so they must all be known to come.
  static std::shared_ptr<Communicator> group(
      std::shared_ptr<MpiLibrary> mpi,
      intptr_t world,
      const std::vector<int>& ranks);

  int rank() const {
    return rank_;
  }
  int size() const {
    return size_;
  }
  trm_handle handle() const {
    return comm_;
  }
  const std::shared_ptr<MpiLibrary>& mpi() const {
    return mpi_;
  }

  // Collective: every rank's bytes, in rank order. Throws MissingRanks, MpiError, and what a signal throws.
  std::vector<std::string> allgather(const std::string& data, double timeout, const SignalService& signals);
  // Collective. Idempotent.
  void free();

 private:
  Communicator(std::shared_ptr<MpiLibrary> mpi, trm_handle comm);

  const std::shared_ptr<MpiLibrary> mpi_;
  trm_handle comm_;
  int rank_ = 0;
  int size_ = 1;
};

} // namespace torch_rpc_mpi
