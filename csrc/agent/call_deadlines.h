// The calls that are late, and those whose time is over. See Note [Late calls].
#pragma once

#include <string>
#include <vector>

#include "agent/call_table.h"
#include "agent/completion.h"
#include "agent/flight_log.h"
#include "agent/late_calls.h"
#include "agent/membership.h"
#include "agent/server.h"
#include "engine/engine.h"
#include "peer/exchange.h"

namespace torch_rpc_mpi {

// Of the token's holder, to whom late_ belongs; the call table guards itself, the rest is immutable. What completes
// calls goes to `tasks`.
class CallDeadlines {
 public:
  CallDeadlines(
      const Membership& members,
      CallTable& calls,
      Completion& completion,
      Exchange& exchange,
      Server& server,
      FlightLog& flightLog);

  // Some of the calls that are due; the table's nextDeadline() tells whether there are more.
  void expire(ProgressToken& token, Clock::time_point now, std::vector<TaskPtr>& tasks);
  // What has become of calls that were late.
  void onStatement(int source, const Statement& statement);
  // All calls of a closed table, with the reason, unless they have one. Short of memory for tasks it throws, and the
  // rest stays.
  void failAll(const std::string& reason, std::vector<TaskPtr>& tasks);

 private:
  class ExpiryTask;

  void askAfterLate(ProgressToken& token);
  OutboundPtr forget(ProgressToken& token, const PendingCall& call) noexcept;

  const Membership& members_;
  CallTable& calls_;
  Completion& completion_;
  Exchange& exchange_;
  Server& server_;
  FlightLog& flightLog_;
  struct Late {
    int peer;
    uint64_t id;
  };
  std::vector<Late> late_; // in this turn
};

} // namespace torch_rpc_mpi
