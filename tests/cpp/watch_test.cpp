// Ranks of other hosts, imitated by several watches of this process, over real connections.
#include "liveness/watch.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

using namespace torch_rpc_mpi;

namespace {

using std::chrono::milliseconds;

constexpr auto kPatience = std::chrono::seconds(30);

// Ranks that are alone on their hosts.
std::vector<std::unique_ptr<Watch>> ranksAlone(size_t size, milliseconds timeout) {
  std::vector<std::unique_ptr<Watch>> watches;
  Watch::Group group;
  for (size_t rank = 0; rank < size; ++rank) {
    watches.push_back(std::make_unique<Watch>());
    group.addresses.push_back(watches.back()->address());
    group.hosts.push_back(static_cast<int>(rank));
  }
  group.secret = std::string(kSecretBytes, 's');
  group.heartbeatTimeout = timeout;
  group.hasEnded = [](int) { return false; };
  for (const auto& watch : watches) {
    watch->start(group);
    ++group.self;
  }
  return watches;
}

// The last rank is another process.
struct ForkedProcess {
  ForkedProcess(const std::function<void()>& child, milliseconds timeout, std::vector<int> hosts = {0, 1})
      : hosts_(std::move(hosts)) {
    int here[2];
    int there[2];
    CHECK_THAT(pipe(here) == 0 && pipe(there) == 0);
    std::vector<std::string> addresses;
    for (size_t rank = 0; rank + 1 < hosts_.size(); ++rank) {
      watches.push_back(std::make_unique<Watch>());
      addresses.push_back(watches.back()->address());
    }
    pid = fork(); // before there are threads, which the child would lack
    if (pid == 0) {
      Watch watch;
      addresses.push_back(watch.address());
      const std::string line = addresses.back() + '\n';
      (void)!write(there[1], line.data(), line.size());
      begin(watch, addresses.size() - 1, addresses, timeout);
      child();
      _exit(0);
    }
    addresses.push_back(readLine(there[0]));
    for (size_t rank = 0; rank < watches.size(); ++rank) {
      begin(*watches[rank], rank, addresses, timeout);
    }
    for (const int end : {here[0], here[1], there[0], there[1]}) {
      close(end);
    }
    std::this_thread::sleep_for(milliseconds(300)); // till all are connected
  }
  ~ForkedProcess() {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }

  static std::string readLine(int descriptor) {
    std::string line;
    for (char each = 0; read(descriptor, &each, 1) == 1 && each != '\n';) {
      line += each;
    }
    return line;
  }
  void begin(Watch& watch, size_t self, const std::vector<std::string>& addresses, milliseconds timeout) {
    watch.start({static_cast<int>(self), addresses, hosts_, std::string(kSecretBytes, 's'), timeout, [this](int rank) {
                   return rank == ended;
                 }});
  }

  std::atomic<int> ended{-1}; // what those beside it say
  std::vector<std::unique_ptr<Watch>> watches;
  pid_t pid = -1;

 private:
  const std::vector<int> hosts_;
};

std::optional<Watch::Finding> findingWithin(Watch& watch, Clock::duration limit) {
  const auto end = Clock::now() + limit;
  do {
    auto findings = watch.takeFindings();
    if (!findings.empty()) {
      return findings.front();
    }
    std::this_thread::sleep_for(milliseconds(1));
  } while (Clock::now() < end);
  return std::nullopt;
}

} // namespace

TEST(watch_ring_gives_each_rank_one_watcher_of_another_host) {
  for (const std::vector<int>& hosts : std::vector<std::vector<int>>{
           {0, 1}, {0, 1, 2}, {0, 0, 0, 0, 4, 4, 4, 4}, {0, 0, 0, 3}, {0, 1, 0, 1, 0}, {0, 0, 2, 3, 3, 3, 2, 7}}) {
    const int size = static_cast<int>(hosts.size());
    for (int lost = -1; lost < size; ++lost) {
      std::vector<int> watchers(hosts.size());
      for (int self = 0; self < size; ++self) {
        WatchRing ring(self, hosts);
        if (lost >= 0) {
          ring.lose(lost);
        }
        if (self == lost) {
          continue;
        }
        for (const int rank : ring.watched()) {
          CHECK_THAT(hosts[rank] != hosts[self]);
          ++watchers[rank];
        }
      }
      for (int rank = 0; rank < size; ++rank) {
        bool others = false; // whether there is one that can watch it
        for (int other = 0; other < size; ++other) {
          others = others || (other != lost && hosts[other] != hosts[rank]);
        }
        CHECK_EQUAL(watchers[rank], rank != lost && others ? 1 : 0);
      }
    }
  }
}

TEST(watch_ring_shares_the_work) {
  const std::vector<int> hosts{0, 0, 0, 0, 4, 4, 4, 4};
  for (int self = 0; self < 8; ++self) {
    CHECK_EQUAL(WatchRing(self, hosts).watched().size(), 1U);
  }
  CHECK_THAT(WatchRing(5, hosts).besides(4) == (std::vector<int>{5, 6, 7}));
}

TEST(watch_finds_nothing_of_those_that_live_and_of_those_that_leave) {
  const auto watches = ranksAlone(3, milliseconds(400));
  std::this_thread::sleep_for(milliseconds(1200));
  watches[1]->leave();
  std::this_thread::sleep_for(milliseconds(600));
  for (const auto& watch : watches) {
    CHECK_THAT(watch->takeFindings().empty());
  }
}

TEST(watch_finds_at_once_that_a_process_has_ended) {
  ForkedProcess other([] { pause(); }, std::chrono::hours(1));
  kill(other.pid, SIGKILL);
  const auto finding = findingWithin(*other.watches[0], kPatience);
  CHECK_THAT(finding && finding->rank == 1 && finding->kind == Watch::Kind::kEnded);
}

TEST(watch_finds_that_a_process_is_silent) {
  ForkedProcess other([] { pause(); }, milliseconds(1000));
  kill(other.pid, SIGSTOP);
  const auto finding = findingWithin(*other.watches[0], kPatience);
  CHECK_THAT(finding && finding->kind == Watch::Kind::kSilent);
  CHECK_THAT(finding->text.find("heartbeat_timeout is 1 s") != std::string::npos);
}

TEST(watch_finds_nothing_of_a_process_that_was_stopped_for_less) {
  ForkedProcess other([] { pause(); }, milliseconds(3000));
  kill(other.pid, SIGSTOP);
  CHECK_THAT(!findingWithin(*other.watches[0], milliseconds(2000)));
  kill(other.pid, SIGCONT);
  CHECK_THAT(!findingWithin(*other.watches[0], milliseconds(4000)));
}

TEST(watch_is_closed_in_forked_children) {
  // The child of the other process lives on when that one dies.
  ForkedProcess other(
      [] {
        if (fork() == 0) {
          sleep(20);
          _exit(0);
        }
        pause();
      },
      std::chrono::hours(1));
  std::this_thread::sleep_for(milliseconds(200)); // till the child's child is there
  kill(other.pid, SIGKILL);
  const auto finding = findingWithin(*other.watches[0], std::chrono::seconds(10));
  CHECK_THAT(finding && finding->kind == Watch::Kind::kEnded);
}

TEST(watch_is_taken_over_from_one_that_is_lost) {
  ForkedProcess other([] { pause(); }, std::chrono::hours(1), {0, 1, 2}); // 0 watches 1, 1 watches 2
  other.watches[1]->leave();
  other.watches[0]->forget(1);
  std::this_thread::sleep_for(milliseconds(300)); // till 0 is connected to 2
  kill(other.pid, SIGKILL);
  const auto finding = findingWithin(*other.watches[0], kPatience);
  CHECK_THAT(finding && finding->rank == 2 && finding->kind == Watch::Kind::kEnded);
}

TEST(watch_that_is_cut_off_gives_up_also_those_that_it_takes_over) {
  // 2 loses 3, and so comes to watch 0, with which it has never had a connection.
  ForkedProcess other([] { pause(); }, milliseconds(1000), {0, 1, 2, 3}); // 0 watches 1, 1 watches 2, 2 watches 3
  kill(other.pid, SIGSTOP);
  const auto first = findingWithin(*other.watches[2], kPatience);
  CHECK_THAT(first && first->rank == 3 && first->kind == Watch::Kind::kSilent);
  other.watches[0].reset(); // nobody listens where it was: as good as a host that is gone
  other.watches[2]->forget(3);
  const auto second = findingWithin(*other.watches[2], kPatience);
  CHECK_THAT(second && second->rank == 0 && second->kind == Watch::Kind::kSilent);
}

TEST(watch_believes_those_beside_one_that_is_silent) {
  for (const bool ended : {false, true}) {
    ForkedProcess other([] { pause(); }, milliseconds(1000), {0, 1, 1});
    kill(other.pid, SIGSTOP);
    other.ended = ended ? 2 : -1;
    const auto finding = findingWithin(*other.watches[0], ended ? kPatience : std::chrono::seconds(3));
    CHECK_EQUAL(finding.has_value(), ended);
    CHECK_THAT(!ended || (finding->rank == 2 && finding->kind == Watch::Kind::kEnded));
  }
}

TEST(watch_takes_no_notice_of_strangers) {
  ForkedProcess other([] { pause(); }, milliseconds(1000));
  const std::string address = other.watches[0]->address();
  const std::string first = address.substr(0, address.find(','));
  for (const char filling : {'\0', 's', 'x'}) {
    int error = 0;
    const Socket stranger = connectTo(first, error);
    CHECK_EQUAL(error, 0);
    std::this_thread::sleep_for(milliseconds(50));
    (void)sendNow(stranger, std::string(sizeof(Greeting), filling).data(), sizeof(Greeting));
    char byte = 0;
    const auto limit = Clock::now() + kPatience;
    ssize_t count = -1;
    while ((count = recv(stranger.descriptor(), &byte, 1, MSG_DONTWAIT)) < 0 && errno == EAGAIN) {
      CHECK_THAT(Clock::now() < limit);
      std::this_thread::sleep_for(milliseconds(1));
    }
    CHECK_THAT(count <= 0); // cut off, without a word
  }
  CHECK_THAT(other.watches[0]->takeFindings().empty());
}
