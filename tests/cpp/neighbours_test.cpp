// Real processes and real shared memory.
#include "host/neighbours.h"

#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <thread>

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

using namespace torch_rpc_mpi;

namespace {

// A process that has made its bell and then waits to be killed.
struct Process {
  Process() {
    int ends[2];
    CHECK_THAT(pipe(ends) == 0);
    pid = fork();
    if (pid == 0) {
      const Neighbours own;
      const std::string text = own.address();
      const ssize_t written = write(ends[1], text.data(), text.size());
      (void)written;
      close(ends[1]);
      for (;;) {
        pause();
      }
    }
    close(ends[1]);
    char buffer[256];
    for (ssize_t count = 0; (count = read(ends[0], buffer, sizeof(buffer))) > 0;) {
      address.append(buffer, static_cast<size_t>(count));
    }
    close(ends[0]);
  }
  ~Process() {
    end();
  }
  void end() {
    if (pid > 0) {
      kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
      pid = -1;
    }
  }
  pid_t pid = -1;
  std::string address;
};

// In this thread, for good.
void forbid(uint32_t systemCall) {
  std::array<sock_filter, 4> code{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, systemCall, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog filter{code.size(), code.data()};
  CHECK_THAT(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  CHECK_THAT(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0);
}

} // namespace

TEST(neighbours_ring_each_other) {
  Neighbours first;
  Neighbours second;
  const std::vector<std::string> addresses{first.address(), second.address()};
  first.meet(addresses, 0);
  second.meet(addresses, 1);
  CHECK_THAT(first.reachesAll());
  CHECK_THAT(second.reachesAll());
  Doorbell sleeper(second.bell());
  const uint32_t ticket = sleeper.prepare();
  first.ring(1);
  CHECK_THAT(sleeper.wait(ticket, std::chrono::hours(1)));
  first.ring(0); // nothing
}

TEST(neighbours_know_what_each_has_taken_of_the_other) {
  Neighbours first;
  Neighbours second;
  const std::vector<std::string> addresses{first.address(), second.address(), "of another host"};
  first.meet(addresses, 0);
  second.meet(addresses, 1);
  CHECK_EQUAL(first.taken(1, 0).value(), 0U);
  second.took(0, 0);
  second.took(0, 0);
  second.took(0, 1);
  second.took(2, 1);
  CHECK_EQUAL(first.taken(1, 0).value(), 2U);
  CHECK_EQUAL(first.taken(1, 1).value(), 1U);
  CHECK_EQUAL(second.taken(0, 0).value(), 0U);
  CHECK_THAT(!first.taken(2, 0));
  first.awaitTaking(2, 1); // nothing
  Doorbell sleeper(first.bell());
  const uint32_t ticket = sleeper.prepare();
  second.took(0, 0);
  CHECK_THAT(!sleeper.wait(ticket, std::chrono::milliseconds(1)));
  const uint32_t next = sleeper.prepare();
  first.awaitTaking(1, 6);
  second.took(0, 0);
  CHECK_EQUAL(sleeper.prepare(), next);
  sleeper.cancel();
  second.took(0, 1);
  CHECK_THAT(sleeper.wait(next, std::chrono::hours(1)));
}

TEST(neighbours_learn_that_a_process_has_ended) {
  Process other;
  Process another;
  Neighbours own;
  own.meet({own.address(), other.address, another.address}, 0);
  CHECK_THAT(own.reachesAll());
  CHECK_THAT(own.takeEnded().empty());
  other.end();
  CHECK_THAT(own.takeEnded() == std::vector<int>{1});
  CHECK_THAT(own.takeEnded().empty()); // once
  own.ring(1);                         // harmless
}

TEST(neighbours_learn_that_a_process_has_ended_where_the_system_gives_no_descriptors) {
  std::thread([] {
    forbid(SYS_pidfd_open);
    Process other;
    Process another;
    Neighbours own;
    own.meet({own.address(), other.address, another.address}, 0);
    CHECK_THAT(own.reachesAll());
    CHECK_THAT(own.takeEnded().empty());
    CHECK_THAT(!own.hasEnded(1, std::chrono::milliseconds(10)));
    kill(other.pid, SIGKILL); // a zombie, for as long as nobody waits for it
    CHECK_THAT(own.hasEnded(1, std::chrono::seconds(10)));
    siginfo_t end{};
    CHECK_EQUAL(waitid(P_PID, static_cast<id_t>(other.pid), &end, WEXITED | WNOWAIT), 0); // till then it is exiting
    CHECK_THAT(own.takeEnded() == std::vector<int>{1});
    CHECK_THAT(own.takeEnded().empty());
    another.end();
    CHECK_THAT(own.takeEnded() == std::vector<int>{2});
  }).join();
}

TEST(neighbours_are_not_whom_an_address_does_not_lead_to) {
  Neighbours stranger;
  std::string wrongMark = stranger.address();
  wrongMark.back() = wrongMark.back() == '0' ? '1' : '0';
  const std::string pid = std::to_string(getpid());
  for (const std::string& address :
       {std::string(), std::string("nonsense"), wrongMark, pid + " 0 1 2", pid + " 9999 1 2",
        std::string("999999999 3 1 2")}) {
    Neighbours own;
    own.meet({own.address(), address}, 0);
    CHECK_THAT(!own.reachesAll());
    own.ring(1); // nothing
    CHECK_THAT(own.takeEnded().empty());
  }
}
