// The connections that other ranks make to this one: to watch it, or to ask about its neighbours.
#pragma once

#include <chrono>
#include <functional>
#include <list>
#include <string>
#include <vector>

#include <poll.h>

#include "base/clock.h"
#include "liveness/greeting.h"
#include "liveness/sockets.h"

namespace torch_rpc_mpi {

// Guarded by whoever has it.
class Visitors {
 public:
  using Time = Clock::time_point;

  // Listens.
  Visitors();

  // Where the others reach this rank; empty if they cannot.
  std::vector<std::string> endpoints() const {
    return endpointsOf(listener_);
  }
  // expected: what is to be in a greeting. hasEnded: of the ranks of this host.
  void begin(const Greeting& expected, std::chrono::milliseconds beat, std::function<bool(int rank)> hasEnded);

  // What to wait for.
  void addTo(std::vector<pollfd>& polled) const;
  // Serves all of them, as far as can be done now.
  void serve(Time now);
  // Stops listening; tells them that this rank leaves, if it says so.
  void leave(bool says);

 private:
  struct Visitor {
    Socket socket;
    Time since;
    Greeting greeting;
    size_t bytes = 0; // of the greeting
    bool watches = false;
  };

  bool serve(Visitor& visitor, Time now); // whether it stays
  bool answer(Visitor& visitor);

  Socket listener_;
  Greeting expected_;
  std::chrono::milliseconds beat_{};
  std::function<bool(int rank)> hasEnded_;
  std::list<Visitor> visitors_;
  Time nextBeat_{};
  bool full_ = false; // of the descriptors of this process: whoever wants to connect waits
};

} // namespace torch_rpc_mpi
