// Whether the other processes that are to form a group still live, and what MPI has left when one of them does not.
#include <filesystem>
#include <fstream>

#include <csignal>

#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "launch/companions.h"
#include "launch/shared_files.h"

using namespace torch_rpc_mpi;

namespace {

pid_t startOther() {
  const pid_t pid = fork();
  if (pid == 0) {
    pause();
    _exit(0);
  }
  return pid;
}

} // namespace

TEST(companions_tell_who_has_ended) {
  const pid_t lives = startOther(), ends = startOther();
  Companions companions({{lives, "rank 0"}, {ends, "rank 1"}});
  CHECK_THAT(!companions.ended());
  companions.check();
  kill(ends, SIGKILL);
  CHECK_EQUAL(companions.ended(std::chrono::seconds(20)).value_or("nobody"), std::string("rank 1"));
  CHECK_THROWS(companions.check(), "rank 1 has ended while the group formed");
  kill(lives, SIGKILL);
  waitpid(lives, nullptr, 0);
  waitpid(ends, nullptr, 0);
}

TEST(companions_may_be_none) {
  CHECK_THAT(!Companions({}).ended(std::chrono::milliseconds(1)));
}

TEST(shared_files_are_those_of_one_world) {
  // As MPICH 5.0.2 has named the file of such a world.
  const std::string world = "9f920ef51e3445df811c9e00758c56ec";
  const std::filesystem::path own = "/dev/shm/mpich_shm_26a60734_0", others = "/dev/shm/mpich_shm_26a60735_0";
  std::ofstream{own}.put('x');
  std::ofstream{others}.put('x');
  removeSharedFiles(world);
  CHECK_THAT(!std::filesystem::exists(own));
  CHECK_THAT(std::filesystem::remove(others));
}
