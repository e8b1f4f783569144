// The MPI library that mpi4py has loaded, reached through the shim of its ABI.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "mpi/mpi_table.h"

namespace torch_rpc_mpi {

// An MPI call failed; what() holds the call's name and MPI's own text.
class MpiError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Immutable after construction, so shared freely. Never unloaded: MPI libraries do not survive dlclose().
class MpiLibrary {
 public:
  // shimPath: the shim of the ABI. extensionPath: mpi4py's extension, which must be loaded already; its own copy of
  // libmpi is the one that is used. Throws std::runtime_error.
  MpiLibrary(const std::string& shimPath, const std::string& extensionPath);

  const trm_mpi_table& operator*() const {
    return *table_;
  }
  const trm_mpi_table* operator->() const {
    return table_;
  }

  // The one place that looks at MPI return codes. Throws MpiError.
  void check(int code, const char* call) const;
  std::string errorText(int code) const;
  bool initialized() const;
  bool finalized() const;
  int threadLevel() const;
  // Asks for MPI_THREAD_MULTIPLE. Blocks until every rank of the world has called it.
  void initialize() const;
  std::string libraryVersion() const;
  // Ends all processes of the communicator, which is given as Communicator's parent is, or at least this one.
  [[noreturn]] void abort(intptr_t communicator, int status) const;

 private:
  const trm_mpi_table* table_ = nullptr;
};

} // namespace torch_rpc_mpi
