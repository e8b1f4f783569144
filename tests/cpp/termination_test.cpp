// Real processes, which SIGTERM ends.
#include "host/termination.h"

#include <csignal>
#include <string>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

using namespace torch_rpc_mpi;

namespace {

struct End {
  int status = 0; // as of waitpid
  std::string words;
};

// A child whose standard error is a pipe, and what becomes of it.
class Child {
 public:
  template <typename Body>
  explicit Child(Body body) {
    CHECK_THAT(pipe(output_) == 0);
    pid_ = fork();
    CHECK_THAT(pid_ >= 0);
    if (pid_ == 0) {
      dup2(output_[1], STDERR_FILENO);
      close(output_[0]);
      close(output_[1]);
      body();
      kill(getpid(), SIGTERM);
      _exit(0); // not reached, unless it is ignored
    }
    close(output_[1]);
  }
  ~Child() {
    close(output_[0]);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const {
    return pid_;
  }
  // Whether anybody reads its output or not.
  int status() const { // as of waitpid
    int status = 0;
    CHECK_THAT(waitpid(pid_, &status, 0) == pid_);
    return status;
  }
  End end() const {
    End end;
    char text[4096];
    for (ssize_t bytes; (bytes = read(output_[0], text, sizeof text)) > 0;) {
      end.words.append(text, static_cast<size_t>(bytes));
    }
    end.status = status();
    return end;
  }

 private:
  int output_[2];
  pid_t pid_ = -1;
};

// Of a child that does this, and then is sent SIGTERM by itself.
template <typename Body>
End endAfter(Body body) {
  return Child(body).end();
}

bool endedBySignal(int status) {
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM;
}

bool endedBySignal(const End& end) {
  return endedBySignal(end.status);
}

TEST(what_sigterm_ends_says_so) {
  const End end = endAfter([] { new TerminationNotice("worker1 is ended"); });
  CHECK_THAT(endedBySignal(end));
  CHECK_THAT(end.words == "worker1 is ended\n");
}

// As a launcher does, which ends all of a host.
TEST(what_the_parent_ends_says_so_where_it_is_to) {
  for (const bool isToSay : {true, false}) {
    int ready[2];
    CHECK_THAT(pipe(ready) == 0);
    const Child child([&] {
      new TerminationNotice("worker1 is ended", isToSay);
      (void)!write(ready[1], "", 1);
      for (;;) {
        pause();
      }
    });
    char byte = 0;
    CHECK_THAT(read(ready[0], &byte, 1) == 1);
    kill(child.pid(), SIGTERM);
    const End end = child.end();
    CHECK_THAT(endedBySignal(end));
    CHECK_THAT(end.words == (isToSay ? "worker1 is ended\n" : ""));
    close(ready[0]);
    close(ready[1]);
  }
}

TEST(a_line_that_is_too_long_is_cut) {
  const End end = endAfter([] { new TerminationNotice(std::string(5000, 'x')); });
  CHECK_THAT(endedBySignal(end));
  CHECK_THAT(end.words == std::string(1023, 'x') + "\n");
}

TEST(sigterm_has_its_default_effect_after_the_session) {
  const End end = endAfter([] {
    TerminationNotice notice("worker1 is ended");
    notice.cancel();
    notice.cancel();
  });
  CHECK_THAT(endedBySignal(end));
  CHECK_THAT(end.words.empty());
}

TEST(each_session_has_its_own_line) {
  const End end = endAfter([] {
    TerminationNotice("worker1 is ended").cancel();
    auto* const current = new TerminationNotice("worker2 is ended");
    TerminationNotice("worker3 is ended").cancel(); // which had no effect, and takes none away
    (void)current;
  });
  CHECK_THAT(endedBySignal(end));
  CHECK_THAT(end.words == "worker2 is ended\n");
}

TEST(a_handler_of_the_users_stays) {
  for (const bool before : {true, false}) {
    const End end = endAfter([before] {
      const auto install = [] { std::signal(SIGTERM, [](int) { _exit(7); }); };
      if (before) {
        install();
      }
      auto* const notice = new TerminationNotice("worker1 is ended");
      if (!before) {
        install();
        notice->cancel();
      }
    });
    CHECK_THAT(WIFEXITED(end.status) && WEXITSTATUS(end.status) == 7);
    CHECK_THAT(end.words.empty());
  }
}

TEST(sigterm_that_is_ignored_stays_so) {
  const End end = endAfter([] {
    std::signal(SIGTERM, SIG_IGN);
    new TerminationNotice("worker1 is ended");
  });
  CHECK_THAT(WIFEXITED(end.status) && WEXITSTATUS(end.status) == 0);
  CHECK_THAT(end.words.empty());
}

// As a library does that saves and restores what it finds.
TEST(what_is_put_back_after_a_session_says_nothing_and_does_not_keep_the_next_one_from_it) {
  const auto putBack = [] {
    TerminationNotice notice("worker1 is ended");
    struct sigaction found{};
    sigaction(SIGTERM, nullptr, &found);
    std::signal(SIGTERM, SIG_IGN);
    notice.cancel();
    sigaction(SIGTERM, &found, nullptr);
  };
  const End none = endAfter(putBack);
  CHECK_THAT(endedBySignal(none));
  CHECK_THAT(none.words.empty());
  const End next = endAfter([&] {
    putBack();
    new TerminationNotice("worker2 is ended");
  });
  CHECK_THAT(endedBySignal(next));
  CHECK_THAT(next.words == "worker2 is ended\n");
}

TEST(nobody_who_reads_its_output_keeps_a_process_from_its_end) {
  const Child child([] {
    new TerminationNotice("worker1 is ended");
    fcntl(STDERR_FILENO, F_SETFL, O_NONBLOCK);
    const std::string filling(4096, 'x');
    while (write(STDERR_FILENO, filling.data(), filling.size()) > 0) {
    }
    fcntl(STDERR_FILENO, F_SETFL, 0);
  });
  CHECK_THAT(endedBySignal(child.status()));
}

TEST(a_forked_child_is_ended_without_a_word) {
  const End end = endAfter([] {
    new TerminationNotice("worker1 is ended");
    const pid_t child = fork();
    if (child == 0) {
      kill(getpid(), SIGTERM);
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (!endedBySignal(status)) {
      _exit(1);
    }
  });
  CHECK_THAT(endedBySignal(end));
  CHECK_THAT(end.words == "worker1 is ended\n");
}

} // namespace
