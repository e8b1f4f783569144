// What has become of requests here, for callers whose calls are late: the callee's side of Note [Late calls].
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "agent/late_calls.h"
#include "agent/running_requests.h"
#include "agent/unbegun_requests.h"
#include "engine/engine.h"
#include "peer/exchange.h"

namespace torch_rpc_mpi {

// Immutable; what it asks guards itself.
class RequestStates {
 public:
  // engine: there when the first question comes.
  RequestStates(
      int rank,
      int numWorkerThreads,
      const Exchange& exchange,
      const std::shared_ptr<Engine>& engine,
      const UnbegunRequests& unbegun,
      const RunningRequests& running)
      : rank_(rank),
        numWorkerThreads_(numWorkerThreads),
        exchange_(exchange),
        engine_(engine),
        unbegun_(unbegun),
        running_(running) {}

  // Of calls of `source`.
  Statement of(ProgressToken& token, int source, const std::vector<uint64_t>& ids) const;

 private:
  Business business() const;
  LateCall of(ProgressToken& token, int source, uint64_t id) const;

  const int rank_;
  const int numWorkerThreads_;
  const Exchange& exchange_;
  const std::shared_ptr<Engine>& engine_;
  const UnbegunRequests& unbegun_;
  const RunningRequests& running_;
};

} // namespace torch_rpc_mpi
