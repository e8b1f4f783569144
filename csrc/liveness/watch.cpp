#include "liveness/watch.h"

#include <algorithm>
#include <cerrno>
#include <sstream>
#include <stdexcept>
#include <utility>

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "host/fork_guard.h"
#include "host/other_process.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace {

constexpr auto kAttemptLimit = std::chrono::seconds(1); // to connect, or to be answered
constexpr size_t kAskedAtOnce = 3;

std::string secondsText(Clock::duration time) {
  std::ostringstream text;
  text.precision(3);
  text << std::chrono::duration<double>(time).count() << " s";
  return text.str();
}

} // namespace

Watch::Watch() : wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  watchForks();
}

Watch::~Watch() {
  if (inForkedChild()) {
    if (thread_.joinable()) {
      thread_.detach(); // there is none here
    }
  } else {
    end(/*says=*/false);
  }
  ::close(wake_);
}

std::string Watch::address() const {
  return asText(visitors_.endpoints());
}

void Watch::start(Group group) {
  if (group.addresses.size() != group.hosts.size() || group.secret.size() != kSecretBytes) {
    throw std::runtime_error("an address and a host are needed for each rank, and a secret");
  }
  group_ = std::move(group);
  for (const std::string& address : group_.addresses) {
    endpoints_.push_back(endpointsIn(address));
  }
  std::ranges::copy(group_.secret, expected_.secret.begin());
  expected_.to = static_cast<uint32_t>(group_.self);
  visitors_.begin(expected_, group_.heartbeatTimeout / 10, group_.hasEnded);
  ring_.emplace(group_.self, group_.hosts);
  thread_ = startThreadWithoutSignals("what watches other hosts", [this] { run(); });
}

std::vector<Watch::Finding> Watch::takeFindings() {
  if (!found_.load(std::memory_order_relaxed)) {
    return {};
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  found_ = false;
  return std::exchange(findings_, {});
}

void Watch::forget(int rank) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    forgotten_.push_back(rank);
  }
  wake();
}

void Watch::leave() {
  end(/*says=*/true);
}

void Watch::end(bool says) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    saysSo_ = saysSo_ || says;
    stopped_ = true;
  }
  wake();
  if (thread_.joinable()) {
    thread_.join();
  }
}

void Watch::wake() const {
  (void)::eventfd_write(wake_, 1);
}

void Watch::run() {
  pthread_setname_np(pthread_self(), "rpc_mpi_watch");
  lastTurn_ = Clock::now();
  bool goesOn = true;
  while (goesOn) {
    try {
      goesOn = turn(Clock::now());
    } catch (const std::exception&) { // no memory: what could not be done is done later
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
  watched_.clear();
  visitors_.leave(saysSo_);
}

bool Watch::turn(Time now) {
  if (!takeOrders(now)) {
    return false;
  }
  if (now - lastTurn_ > group_.heartbeatTimeout / 2) { // this rank was paused
    for (Watched& watched : watched_) {
      watched.heard = std::max(watched.heard, now - group_.heartbeatTimeout / 2);
    }
  }
  lastTurn_ = now;
  visitors_.serve(now);
  for (Watched& watched : watched_) {
    if (!watched.done) {
      serve(watched, now);
    }
  }
  await(now);
  return true;
}

// Until something comes, or it is time to look.
void Watch::await(Time now) {
  polled_.clear();
  polled_.push_back({wake_, POLLIN, 0});
  visitors_.addTo(polled_);
  const auto add = [&](const Visit& visit) {
    if (visit) {
      polled_.push_back(visit.awaited());
    }
  };
  Clock::duration pause = std::min<Clock::duration>(group_.heartbeatTimeout / 20, std::chrono::seconds(1));
  for (const Watched& watched : watched_) {
    add(watched.visit);
    std::ranges::for_each(watched.questions, add);
    if (!watched.visit && !watched.done) {
      pause = std::min(pause, watched.nextAttempt - now);
    }
  }
  const auto limit = std::chrono::ceil<std::chrono::milliseconds>(std::max(pause, Clock::duration(0)));
  const int ready = ::poll(polled_.data(), polled_.size(), static_cast<int>(limit.count()));
  if (ready > 0 && polled_.front().revents != 0) {
    eventfd_t woken = 0;
    (void)::eventfd_read(wake_, &woken);
  }
}

bool Watch::takeOrders(Time now) {
  std::vector<int> forgotten;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    forgotten.swap(forgotten_);
    if (stopped_) {
      return false;
    }
  }
  for (const int rank : forgotten) {
    ring_->lose(rank);
    chosen_ = false;
  }
  if (!chosen_) {
    chooseWatched(now);
    chosen_ = true;
  }
  return true;
}

void Watch::chooseWatched(Time now) {
  const std::vector<int> ranks = ring_->watched();
  std::erase_if(
      watched_, [&](const Watched& watched) { return std::ranges::find(ranks, watched.rank) == ranks.end(); });
  for (const int rank : ranks) {
    if (std::ranges::none_of(watched_, [&](const Watched& watched) { return watched.rank == rank; })) {
      // One that is taken over where others have fallen silent can be expected to answer, else it is silent as well.
      watched_.push_back({.rank = rank, .heard = now, .nextAttempt = now, .answers = foundSilence_});
    }
  }
}

void Watch::serve(Watched& watched, Time now) {
  if (watched.visit) {
    listen(watched, now);
  }
  const auto silence = now - watched.heard;
  // Also where there is a connection: see the note.
  if (!watched.done && now >= watched.nextAttempt && (!watched.visit || silence > group_.heartbeatTimeout / 2)) {
    connect(watched, now);
  }
  if (!watched.done) {
    ask(watched, now);
  }
  if (!watched.done) {
    judge(watched, now);
  }
}

Visit Watch::visitTo(int rank, size_t endpoint, Purpose purpose, int about, Time now, int& error) const {
  const std::vector<std::string>& endpoints = endpoints_[rank];
  if (endpoints.empty()) {
    error = EADDRNOTAVAIL;
    return {};
  }
  Greeting greeting = expected_;
  greeting.to = static_cast<uint32_t>(rank);
  greeting.purpose = purpose;
  greeting.about = static_cast<uint32_t>(about);
  return {endpoints[endpoint % endpoints.size()], greeting, now, error};
}

void Watch::connect(Watched& watched, Time now) {
  int error = 0;
  watched.visit = visitTo(watched.rank, watched.endpoint, Purpose::kWatch, 0, now, error);
  watched.nextAttempt = now + std::min<Clock::duration>(group_.heartbeatTimeout / 10, kAttemptLimit);
  if (watched.visit) {
    listen(watched, now);
  } else {
    lose(watched, error, now);
  }
}

void Watch::listen(Watched& watched, Time now) {
  int error = 0;
  if (!watched.visit.greet(error)) {
    if (!Visit::pending(error) || now - watched.visit.since() > kAttemptLimit) {
      lose(watched, error, now);
    }
    return;
  }
  const std::optional<Signal> last = watched.visit.receiveLast(error);
  if (last == Signal::kBeat || last == Signal::kLeaves) {
    watched.heard = now;
    watched.known = watched.answers = true;
    watched.questions.clear();
    watched.done = last == Signal::kLeaves;
  }
  if (watched.done) {
    watched.visit = {};
  } else if (!Visit::pending(error)) {
    lose(watched, error, now);
  } else if (watched.heard < watched.visit.since() && now - watched.visit.since() > kAttemptLimit) {
    ++watched.endpoint; // whoever is there says nothing
  }
}

// A process that was heard of, and whose host now says that nobody listens there, or somebody else, has ended.
void Watch::lose(Watched& watched, int error, Time now) {
  const bool refused = error == ECONNREFUSED ||
      (watched.visit.greeted() && now - watched.visit.since() < kAttemptLimit && watched.heard < watched.visit.since());
  watched.visit = {};
  if (watched.known && refused) {
    find(watched, Kind::kEnded, kEndedWithoutLeaving);
  } else if (watched.known && error == ECONNRESET) {
    watched.nextAttempt = now; // to see whether it is the process or the connection that has ended
  } else if (!watched.known) {
    ++watched.endpoint; // perhaps it is another that leads there
  }
}

// Those beside one that is silent, when its time is nearly over.
void Watch::ask(Watched& watched, Time now) {
  listenToAnswers(watched, now);
  if (watched.done || !watched.answers || now - watched.heard < group_.heartbeatTimeout * 3 / 4 ||
      now < watched.nextQuestion) {
    return;
  }
  watched.nextQuestion = now + std::min<Clock::duration>(group_.heartbeatTimeout / 8, kAttemptLimit);
  watched.questions.clear();
  std::vector<int> beside = ring_->besides(watched.rank);
  beside.resize(std::min(beside.size(), kAskedAtOnce));
  for (const int other : beside) {
    for (size_t endpoint = 0; endpoint < endpoints_[other].size(); ++endpoint) {
      int error = 0;
      Visit question = visitTo(other, endpoint, Purpose::kAsk, watched.rank, now, error);
      if (question) {
        watched.questions.push_back(std::move(question));
      }
    }
  }
}

void Watch::listenToAnswers(Watched& watched, Time now) {
  std::optional<Signal> answer;
  std::erase_if(watched.questions, [&](Visit& question) {
    int error = 0;
    if (question.greet(error)) {
      const std::optional<Signal> last = question.receiveLast(error);
      answer = last ? last : answer;
    }
    return !Visit::pending(error);
  });
  if (answer == Signal::kLives) {
    watched.heard = now - group_.heartbeatTimeout / 4;
  } else if (answer == Signal::kEnded) {
    find(watched, Kind::kEnded, kEndedWithoutLeaving);
  }
}

void Watch::judge(Watched& watched, Time now) {
  const auto silence = now - watched.heard;
  if (silence < group_.heartbeatTimeout) {
    return;
  }
  if (watched.answers) {
    find(
        watched, Kind::kSilent,
        "nothing was heard of it for " + secondsText(silence) + " (heartbeat_timeout is " +
            secondsText(group_.heartbeatTimeout) +
            "): its host or the network to it is down, or its process is stopped");
  } else {
    find(
        watched, Kind::kUnreachable,
        "no connection to it could be made within " + secondsText(silence) + " (a firewall?)");
    watched.done = false; // it may still come
    watched.heard = Time::max();
  }
}

void Watch::find(Watched& watched, Kind kind, std::string text) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    findings_.push_back({watched.rank, kind, std::move(text)});
    found_ = true;
  }
  foundSilence_ = foundSilence_ || kind == Kind::kSilent;
  watched.done = true;
  watched.visit = {};
  watched.questions.clear();
}

} // namespace torch_rpc_mpi
