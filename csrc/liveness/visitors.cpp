#include "liveness/visitors.h"

#include <cerrno>
#include <utility>

#include <sys/socket.h>

namespace torch_rpc_mpi {

namespace {

// Who has not said so long who it is, is nobody of ours.
constexpr auto kGreetingLimit = std::chrono::seconds(5);
// At once: connections beyond that wait in the system.
constexpr size_t kMostVisitors = 256;

} // namespace

Visitors::Visitors() : listener_(listenOnAll()) {}

void Visitors::begin(const Greeting& expected, std::chrono::milliseconds beat, std::function<bool(int rank)> hasEnded) {
  expected_ = expected;
  beat_ = beat;
  hasEnded_ = std::move(hasEnded);
}

void Visitors::addTo(std::vector<pollfd>& polled) const {
  if (listener_ && !full_ && visitors_.size() < kMostVisitors) {
    polled.push_back({listener_.descriptor(), POLLIN, 0});
  }
  for (const Visitor& visitor : visitors_) {
    polled.push_back({visitor.socket.descriptor(), POLLIN, 0});
  }
}

void Visitors::serve(Time now) {
  while (listener_ && visitors_.size() < kMostVisitors) {
    Socket socket = acceptOne(listener_);
    full_ = !socket && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED;
    if (!socket) {
      break;
    }
    visitors_.push_back({std::move(socket), now, {}});
  }
  const bool beats = now >= nextBeat_;
  if (beats) {
    nextBeat_ = now + beat_;
  }
  std::erase_if(visitors_, [&](Visitor& visitor) {
    if (!serve(visitor, now)) {
      return true;
    }
    if (beats && visitor.watches) { // one that does not read has all that it needs
      (void)sendNow(visitor.socket, Signal::kBeat);
    }
    return false;
  });
}

bool Visitors::serve(Visitor& visitor, Time now) {
  auto* bytes = reinterpret_cast<char*>(&visitor.greeting);
  char nothing = 0;
  for (;;) {
    const size_t wanted = sizeof(Greeting) - visitor.bytes;
    const ssize_t count = wanted > 0 ? ::recv(visitor.socket.descriptor(), bytes + visitor.bytes, wanted, MSG_DONTWAIT)
                                     : ::recv(visitor.socket.descriptor(), &nothing, 1, MSG_DONTWAIT);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return visitor.watches || now - visitor.since < kGreetingLimit;
    }
    if (count <= 0 || wanted == 0) { // it has gone, or says more than there is to say
      return false;
    }
    visitor.bytes += static_cast<size_t>(count);
    if (visitor.bytes == sizeof(Greeting) && !answer(visitor)) {
      return false;
    }
  }
}

bool Visitors::answer(Visitor& visitor) {
  const Greeting& greeting = visitor.greeting;
  if (!greeting.matches(expected_)) {
    return false;
  }
  if (greeting.purpose == Purpose::kAsk) {
    const bool ended = hasEnded_(static_cast<int>(greeting.about));
    (void)sendNow(visitor.socket, ended ? Signal::kEnded : Signal::kLives);
    return false;
  }
  visitor.watches = greeting.purpose == Purpose::kWatch;
  return visitor.watches && sendNow(visitor.socket, Signal::kBeat);
}

void Visitors::leave(bool says) {
  if (says) {
    serve(Clock::now()); // those, too, that have just come
    for (Visitor& visitor : visitors_) {
      if (visitor.watches) {
        (void)sendNow(visitor.socket, Signal::kLeaves);
      }
    }
  }
  visitors_.clear();
  listener_ = Socket();
}

} // namespace torch_rpc_mpi
