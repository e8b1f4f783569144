// The memory that the test device knows: of devices, which is shared memory of the host, and of the host where it is
// pinned or registered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "shared_file.h"

namespace rpctest {

struct Range {
  enum class Kind { kDevice, kOpened, kPinned, kRegistered };
  Kind kind;
  char* begin;
  size_t size;
  int device;    // as this process sees it; of what is on the host -1
  Handle handle; // of kDevice and kOpened
  int uses;      // how often it was opened
};

// The range that holds the address.
std::optional<Range> rangeOf(const void* pointer);

bool onDevice(const void* pointer);
bool onPinnedHost(const void* pointer);

// Each returns an error of the runtime.
int allocateDevice(void** pointer, size_t size, int device);
int freeDevice(void* pointer);
int allocatePinned(void** pointer, size_t size);
int freePinned(void* pointer);
int registerHost(void* pointer, size_t size);
int unregisterHost(void* pointer);
int openMemory(void** pointer, const Handle& handle, int device);
int closeMemory(void* pointer);

} // namespace rpctest
