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
  // Orders the caller's earlier stores (the work it queued) before the look at sleepers; pairs with prepare().
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (word.sleepers.load() == 0) {
    return;
  }
  word.rings.fetch_add(1);
  futex(word.rings, FUTEX_WAKE, INT32_MAX, nullptr);
}

} // namespace torch_rpc_mpi
