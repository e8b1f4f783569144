#include "allocations.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace {

thread_local int before = 0; // those that are made
thread_local int failing = 0;
// No machine has so many bytes; the address sanitizer ends a process that asks for them.
constexpr size_t kAll = size_t{1} << 40;

void* allocate(size_t bytes) {
  if (failing > 0 && before-- <= 0) {
    --failing;
    throw std::bad_alloc();
  }
  void* memory = bytes < kAll ? std::malloc(bytes) : nullptr;
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

} // namespace

namespace torch_rpc_mpi::testing {

void failAllocations(int count, int after) {
  failing = count;
  before = after;
}

OwnAllocations::OwnAllocations() : failing_(std::exchange(failing, 0)), before_(before) {}

OwnAllocations::~OwnAllocations() {
  failAllocations(failing_, before_);
}

} // namespace torch_rpc_mpi::testing

void* operator new(size_t bytes) {
  return allocate(bytes);
}

void* operator new[](size_t bytes) {
  return allocate(bytes);
}

void operator delete(void* memory) noexcept {
  std::free(memory);
}

void operator delete(void* memory, size_t /*bytes*/) noexcept {
  std::free(memory);
}

void operator delete[](void* memory) noexcept {
  std::free(memory);
}

void operator delete[](void* memory, size_t /*bytes*/) noexcept {
  std::free(memory);
}
