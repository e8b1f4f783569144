// Memory that runs out at a chosen moment.
#pragma once

namespace torch_rpc_mpi::testing {

// So many of the next allocations of this thread fail, once `after` others have been made; 0: no longer.
void failAllocations(int count, int after = 0);

// While one lives, this thread's allocations are those of a test's own, neither failed nor counted.
class OwnAllocations {
 public:
  OwnAllocations();
  ~OwnAllocations();
  OwnAllocations(const OwnAllocations&) = delete;
  OwnAllocations& operator=(const OwnAllocations&) = delete;

 private:
  const int failing_, before_;
};

} // namespace torch_rpc_mpi::testing
