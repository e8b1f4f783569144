#include "host/no_memory.h"

#include <sstream>

#include "host/resources.h"

namespace torch_rpc_mpi {

namespace {

std::string textOf(const std::string& what, size_t bytes) {
  std::ostringstream text;
  text << "there is no memory for " << what << " of " << bytes << " bytes: this process has " << residentMemory()
       << " bytes in memory and may use " << usableMemory()
       << ", which is what its host and its cgroup allow (a limit on its addresses, `ulimit -v`, comes on top). Send "
          "less at once, or give it more";
  return text.str();
}

} // namespace

NoMemory::NoMemory(const std::string& what, size_t bytes) : text_(textOf(what, bytes)) {}

} // namespace torch_rpc_mpi
