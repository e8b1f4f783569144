// What a forked child does with what it inherited, while the locks of the parent's other threads stay locked.
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "host/fork_guard.h"
#include "peer/frame.h"
#include "peer/receive_pool.h"
#include "torch_compat/private_member.h"

using namespace torch_rpc_mpi;

namespace torch_rpc_mpi::torch_compat {

struct ReceivePoolMutex {
  using type = std::mutex ReceivePool::*;
  friend type memberOf(ReceivePoolMutex);
};
template struct GrantMember<ReceivePoolMutex, &ReceivePool::mutex_>;

struct FramePoolMutex {
  using type = std::mutex FramePool::*;
  friend type memberOf(FramePoolMutex);
};
template struct GrantMember<FramePoolMutex, &FramePool::mutex_>;

} // namespace torch_rpc_mpi::torch_compat

namespace {

// How a child ended that was forked while another thread held the mutex, and did this.
int inChild(std::mutex& mutex, const std::function<void()>& what) {
  std::promise<void> held;
  std::promise<void> over;
  std::thread holder([&] {
    const std::lock_guard<std::mutex> lock(mutex);
    held.set_value();
    over.get_future().wait();
  });
  held.get_future().wait();
  const pid_t child = fork();
  if (child == 0) {
    alarm(20); // ends it, if it hangs
    what();
    _exit(inForkedChild() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  over.set_value();
  holder.join();
  return status;
}

} // namespace

TEST(forked_child_frees_what_was_received) {
  constexpr size_t kBytes = 3 << 20;
  ReceivePool pool(size_t{10} << 20);
  std::mutex& mutex = pool.*memberOf(torch_compat::ReceivePoolMutex());
  const auto release = [&pool](void* block) { pool.release(block, kBytes); };
  std::unique_ptr<void, decltype(release)> block(pool.allocate(kBytes), release);
  CHECK_EQUAL(inChild(mutex, [&] { block.reset(); }), 0);
  CHECK_EQUAL(inChild(mutex, [&] { release(pool.allocate(kBytes)); }), 0);
  CHECK_EQUAL(inChild(mutex, [&] { pool.trim(Clock::now()); }), 0);
  CHECK_EQUAL(inChild(mutex, [&] { CHECK_EQUAL(pool.cachedBytes(), 0U); }), 0);
  CHECK_THAT(!inForkedChild());
  const void* first = block.get();
  block.reset();
  block.reset(pool.allocate(kBytes)); // here it still comes from the pool
  CHECK_THAT(block.get() == first);
}

TEST(forked_child_frees_frames) {
  const auto pool = std::make_shared<FramePool>(1 << 12);
  std::mutex& mutex = (*pool).*memberOf(torch_compat::FramePoolMutex());
  FrameBuffer frame = pool->get();
  CHECK_EQUAL(inChild(mutex, [&] { frame = FrameBuffer(); }), 0);
  CHECK_EQUAL(inChild(mutex, [&] { (void)pool->get(); }), 0);
}
