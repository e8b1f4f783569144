#include "allocations.h"

#include <cstdlib>
#include <new>

namespace {

thread_local int failing = 0;

} // namespace

void torch_rpc_mpi::testing::failAllocations(int count) {
  failing = count;
}

void* operator new(size_t bytes) {
  if (failing > 0) {
    --failing;
    throw std::bad_alloc();
  }
  if (void* memory = std::malloc(bytes)) {
    return memory;
  }
  throw std::bad_alloc();
}

void operator delete(void* memory) noexcept {
  std::free(memory);
}

void operator delete(void* memory, size_t /*bytes*/) noexcept {
  std::free(memory);
}
