#include "host/doorbell.h"

#include <ctime>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace torch_rpc_mpi {

namespace {

// Not FUTEX_PRIVATE_FLAG: the word may be shared between processes.
long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* limit) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, limit, nullptr, 0);
}

} // namespace

bool Doorbell::wait(uint32_t ticket, std::chrono::nanoseconds limit) {
  if (limit.count() > 0) {
    const timespec time{
        static_cast<time_t>(limit.count() / 1'000'000'000), static_cast<long>(limit.count() % 1'000'000'000)};
    futex(word_.rings, FUTEX_WAIT, ticket, &time);
  }
  cancel();
  return word_.rings.load() != ticket;
}

void Doorbell::ring(BellWord& word) {
  // A read-modify-write of what prepare() counts in, though it changes nothing: of the two one comes first, and what
  // was done before that one, by whatever stores, is seen after the other. So either this sees the sleeper, or the
  // sleeper's second look sees the work that was queued. With a load, each of them would need a fence between its two
  // steps.
  if (word.sleepers.fetch_add(0) == 0) {
    return;
  }
  word.rings.fetch_add(1);
  futex(word.rings, FUTEX_WAKE, INT32_MAX, nullptr);
}

} // namespace torch_rpc_mpi
