#include "host/pages.h"

#include <cstdint>

#include <sys/mman.h>
#include <unistd.h>

namespace torch_rpc_mpi {

void giveBackPages(void* data, size_t bytes) noexcept {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) {
    (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED); // locked ones stay
  }
}

} // namespace torch_rpc_mpi
