// Memory that another process can map: all of it lies in one file in memory, which others open through /proc.
#pragma once

#include <cstddef>
#include <cstdint>

#include <sys/types.h>

namespace rpctest {

// What an IPC handle of 64 bytes holds.
struct Handle {
  enum class Kind : uint32_t { kMemory = 0x6d656d31, kEvent = 0x65766531 };
  Kind kind;
  int32_t device; // physical
  pid_t process;
  int32_t file;
  uint64_t offset;
  uint64_t size;
  uint64_t reserved[4];
};
static_assert(sizeof(Handle) == 64);

// Of this process: such a handle cannot be opened in it.
bool isOwn(const Handle& handle);

// A new range of whole pages, zeroed, or nullptr. The offset is never given out again.
void* mapShared(size_t size, Handle* where);

// Of another process: nullptr where it has ended or the kernel does not permit it.
void* mapShared(const Handle& where);

// Its owner gives the memory back as well.
void unmapShared(void* memory, const Handle& where);

} // namespace rpctest
