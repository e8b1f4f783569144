// Real pipes.
#include "host/launcher_output.h"

#include <atomic>
#include <chrono>
#include <thread>

#include <sys/ioctl.h>
#include <unistd.h>

#include "check.h"

using namespace torch_rpc_mpi;

namespace {

struct Pipe {
  Pipe() {
    CHECK_THAT(pipe(ends) == 0);
  }
  ~Pipe() {
    close(ends[0]);
    close(ends[1]);
  }
  int ends[2] = {-1, -1};
};

TEST(what_is_written_for_a_launcher_is_waited_for) {
  Pipe output;
  CHECK_THAT(write(output.ends[1], "why\n", 4) == 4);
  std::atomic<bool> waits{false};
  std::thread launcher([&] {
    while (!waits) {
      std::this_thread::yield();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5)); // that the other one may go on too early
    char text[4];
    CHECK_THAT(read(output.ends[0], text, sizeof text) == 4);
  });
  waits = true;
  waitUntilRead(output.ends[1], std::chrono::minutes(1));
  int unread = -1;
  CHECK_THAT(ioctl(output.ends[1], FIONREAD, &unread) == 0);
  CHECK_THAT(unread == 0);
  launcher.join();
}

TEST(a_launcher_that_never_reads_is_waited_for_no_longer_than_the_limit) {
  Pipe output;
  CHECK_THAT(write(output.ends[1], "why\n", 4) == 4);
  waitUntilRead(output.ends[1], std::chrono::milliseconds(2));
  waitUntilRead(-1, std::chrono::hours(1));
}

} // namespace
