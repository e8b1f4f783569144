// How the agent ends: after an agreement (Join), or on its own (shutdown without join, exit).
#pragma once

#include <chrono>
#include <exception>
#include <optional>
#include <string>

#include "agent/caller.h"
#include "agent/dispatcher.h"
#include "agent/membership.h"
#include "base/signal_service.h"
#include "engine/engine.h"
#include "peer/exchange.h"

namespace torch_rpc_mpi {

// Used once, by one thread. Local and bounded, whatever the peers do.
class Leaving {
 public:
  Leaving(
      Engine& engine,
      Dispatcher& dispatcher,
      Exchange& exchange,
      Caller& caller,
      const Membership& members,
      const SignalService& signals)
      : engine_(engine),
        dispatcher_(dispatcher),
        exchange_(exchange),
        caller_(caller),
        members_(members),
        signals_(signals) {}

  // Stops the engine, says goodbye unless all have agreed to leave, closes the exchange, fails the calls that are left.
  // farewell: why, for the peers; without it they are told nothing. Returns whether all threads of the engine have
  // ended: the others still use the agent.
  bool leave(bool agreed, const std::optional<std::string>& farewell);

  // What a signal's handler threw meanwhile, which cut short what was left to wait for.
  std::exception_ptr interrupted() const {
    return interrupted_;
  }

 private:
  bool stopEngine(std::chrono::milliseconds limit);
  void sayGoodbye(const std::string& text);
  void flush();
  void serveSignals();

  Engine& engine_;
  Dispatcher& dispatcher_;
  Exchange& exchange_;
  Caller& caller_;
  const Membership& members_;
  const SignalService& signals_;
  std::exception_ptr interrupted_;
};

} // namespace torch_rpc_mpi
