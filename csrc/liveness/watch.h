// Whether the ranks of other hosts are alive.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <poll.h>

#include "base/clock.h"
#include "liveness/greeting.h"
#include "liveness/visit.h"
#include "liveness/visitors.h"
#include "liveness/watch_ring.h"

namespace torch_rpc_mpi {

// Note [Liveness across hosts]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// MPI does not tell that a process of another host has died, or that the host is gone: what is sent is kept, and what
// is waited for never comes. So each rank has a TCP connection to each rank that it watches (Note [Who watches whom]),
// beside MPI, in a thread of its own, which needs neither the engine nor the GIL. The watched one sends ten beats
// in heartbeat_timeout. What is found:
//   - Its process has ended: the system closes the connection, and refuses the next one.
//   - It is silent for heartbeat_timeout: the host or the link is gone, or the process is stopped. Before it is given
//     up, the others of its host are asked, who can see its process: one that is stopped is alive as long as somebody
//     says so. And other connections are tried meanwhile: after an outage the system waits for up to as long again
//     before it repeats what was lost on the old one.
//   - It leaves: it says so, and that its process ends means nothing then.
// A rank that was paused itself has heard of nobody meanwhile. It waits for some beats before it gives anyone up. One
// to which no connection could ever be made (a firewall) is not given up, unless others have fallen silent before: this
// rank is then cut off, and has taken that one over from them. That a rank is not watched is told once.
//
// A connection begins with a greeting that holds a secret of the session. Whoever does not know it is cut off.
//
// Thread-safe once started: mutex_ guards findings_ (found_ is a hint), forgotten_, stopped_ and saysSo_; group_,
// expected_ and endpoints_ are immutable then; the rest is for the thread alone, but what ring_ says in speaksFor().
class Watch {
 public:
  enum class Kind { kEnded, kSilent, kUnreachable };
  struct Finding {
    int rank;
    Kind kind;
    std::string text; // what has happened, a clause about that rank
  };
  struct Group {
    int self = 0;
    std::vector<std::string> addresses; // by rank
    std::vector<int> hosts;             // by rank, see WatchRing
    std::string secret;                 // kSecretBytes of it
    std::chrono::milliseconds heartbeatTimeout{10000};
    std::function<bool(int rank)> hasEnded; // of the ranks of this host; called by the thread
  };

  // Listens.
  Watch();
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // For the other ranks; empty if they cannot connect to this one.
  std::string address() const;
  // Once. Throws std::runtime_error.
  void start(Group group);

  // What was found since the last call. Costs nothing where nothing was.
  std::vector<Finding> takeFindings();
  // It has left, or is lost: nobody needs to find that out any more.
  void forget(int rank);
  // Tells those who watch this rank that it leaves, and ends the thread. (The destructor does not tell.)
  void leave();
  // Of a rank of this host: whether this one is the first of those beside it that live.
  bool speaksFor(int rank, const std::function<bool(int)>& lives) const {
    return ring_->speaksFor(rank, lives);
  }

 private:
  using Time = Clock::time_point;
  struct Watched {
    int rank;
    Time heard;       // or since when it is watched
    Time nextAttempt; // to connect
    Visit visit{};
    size_t endpoint = 0;            // the one to try
    bool known = false;             // it was heard of
    bool answers = false;           // if it lives
    bool done = false;              // what there is to find was found, or it leaves
    std::vector<Visit> questions{}; // to those beside it
    Time nextQuestion{};
  };

  void run();
  bool turn(Time now); // whether to go on
  void end(bool says);
  bool takeOrders(Time now); // whether to go on
  void chooseWatched(Time now);
  void await(Time now);
  void serve(Watched& watched, Time now);
  void connect(Watched& watched, Time now);
  void listen(Watched& watched, Time now);
  void lose(Watched& watched, int error, Time now); // its connection
  void ask(Watched& watched, Time now);
  void listenToAnswers(Watched& watched, Time now);
  void judge(Watched& watched, Time now);
  void find(Watched& watched, Kind kind, std::string text);
  // endpoint: which one of that rank. about: another rank, of a question.
  Visit visitTo(int rank, size_t endpoint, Purpose purpose, int about, Time now, int& error) const;
  void wake() const;

  const int wake_; // eventfd
  Visitors visitors_;

  std::mutex mutex_;
  std::vector<Finding> findings_;
  std::atomic<bool> found_{false};
  std::vector<int> forgotten_;
  bool stopped_ = false;
  bool saysSo_ = false; // that it leaves

  Group group_;
  Greeting expected_;
  std::vector<std::vector<std::string>> endpoints_; // by rank
  std::optional<WatchRing> ring_;
  std::list<Watched> watched_;
  bool chosen_ = false;       // who is in there
  bool foundSilence_ = false; // of somebody
  std::vector<pollfd> polled_;
  Time lastTurn_{};
  std::thread thread_;
};

} // namespace torch_rpc_mpi
