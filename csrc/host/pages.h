// Memory that must stay mapped, but whose contents nobody needs.
#pragma once

#include <cstddef>

namespace torch_rpc_mpi {

// The whole pages of [data, data + bytes) go back to the system. They read as zeros from then on, and what is written
// to them takes new ones. For private memory of this process alone, as malloc and mmap give it.
void giveBackPages(void* data, size_t bytes) noexcept;

} // namespace torch_rpc_mpi
