// A connection that this rank makes to another: to watch it, or to ask it about its neighbour.
#pragma once

#include <cerrno>
#include <optional>
#include <string>

#include <poll.h>

#include "base/clock.h"
#include "liveness/greeting.h"
#include "liveness/sockets.h"

namespace torch_rpc_mpi {

// Guarded by whoever has it.
class Visit {
 public:
  using Time = Clock::time_point;

  Visit() = default; // none
  // Begins to connect. None if that has failed at once: `error` says why.
  Visit(const std::string& endpoint, const Greeting& greeting, Time now, int& error)
      : socket_(connectTo(endpoint, error)),
        greeting_(greeting),
        since_(now) {}

  explicit operator bool() const {
    return static_cast<bool>(socket_);
  }
  Time since() const {
    return since_;
  }
  // What to wait for.
  pollfd awaited() const {
    return {socket_.descriptor(), static_cast<short>(greeted_ ? POLLIN : POLLOUT), 0};
  }

  // Of both that follow: EAGAIN in `error` means not yet, another that the connection has ended.
  static bool pending(int error) {
    return error == EAGAIN || error == EWOULDBLOCK;
  }
  // Greets once it is connected. Whether that is done.
  bool greet(int& error);
  bool greeted() const {
    return greeted_;
  }
  // The last byte of what has arrived, or nothing.
  std::optional<Signal> receiveLast(int& error) const;

 private:
  Socket socket_;
  Greeting greeting_;
  Time since_;
  bool greeted_ = false; // it is connected, and was told who calls
};

} // namespace torch_rpc_mpi
