#include "shared_file.h"

#include <mutex>
#include <string>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace rpctest {

namespace {

constexpr size_t kPage = 4096;
constexpr uint64_t kFileBytes = uint64_t{1} << 46; // sparse

std::mutex mutex;
int file = -1; // guarded by mutex, as is next
uint64_t next = 0;

size_t pages(size_t size) {
  return (size + kPage - 1) / kPage * kPage;
}

} // namespace

bool isOwn(const Handle& handle) {
  return handle.process == getpid();
}

void* mapShared(size_t size, Handle* where) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (file < 0) {
    file = memfd_create("rpctest_device", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, kFileBytes) != 0) {
      return nullptr;
    }
  }
  void* memory = mmap(nullptr, pages(size), PROT_READ | PROT_WRITE, MAP_SHARED, file, static_cast<off_t>(next));
  if (memory == MAP_FAILED) {
    return nullptr;
  }
  where->process = getpid();
  where->file = file;
  where->offset = next;
  where->size = size;
  next += pages(size);
  return memory;
}

void* mapShared(const Handle& where) {
  const std::string path = "/proc/" + std::to_string(where.process) + "/fd/" + std::to_string(where.file);
  const int other = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (other < 0) {
    return nullptr;
  }
  void* memory =
      mmap(nullptr, pages(where.size), PROT_READ | PROT_WRITE, MAP_SHARED, other, static_cast<off_t>(where.offset));
  close(other);
  return memory == MAP_FAILED ? nullptr : memory;
}

// The owner's pages go at once, from under whoever still has them mapped: it then reads zeros. CUDA says that this is
// undefined.
void unmapShared(void* memory, const Handle& where) {
  munmap(memory, pages(where.size));
  if (isOwn(where)) {
    fallocate(
        where.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(where.offset),
        static_cast<off_t>(pages(where.size)));
  }
}

} // namespace rpctest
