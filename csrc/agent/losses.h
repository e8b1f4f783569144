// How this worker learns that others are lost, and whom it tells.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/join.h"
#include "agent/membership.h"
#include "agent/server.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "liveness/watch.h"
#include "peer/exchange.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

// Of the token's holder, to whom the lists and nextLook_ belong; watch_ is set before the engine starts; the rest is
// immutable, or guards itself.
class Losses {
 public:
  // Of parts of an agent that need not be there yet, but for the transport. interval: how often to look whether
  // neighbours are alive.
  Losses(
      Transport& transport,
      Membership& members,
      Exchange& exchange,
      Server& server,
      Join& join,
      std::chrono::milliseconds interval);

  // Who tells of the ranks of other hosts. Null: nobody, as all are on this one.
  void watchOver(std::shared_ptr<Watch> watch) {
    watch_ = std::move(watch);
  }

  // In each turn: fails the peers of other hosts that are lost.
  void takeFindings(ProgressToken& token) {
    if (watch_ != nullptr) {
      failFound(token);
    }
  }
  // Whether it is time to look for neighbours whose processes have ended: in a turn in which nothing moved, so that
  // everything that has arrived was read.
  bool isTimeToLook(Clock::time_point now) const {
    return now >= nextLook_;
  }
  void look(ProgressToken& token, Clock::time_point now);

  // A peer leaves, or says that one is lost. Throws std::runtime_error for news that make no sense.
  void onGoodbye(ProgressToken& token, int source, ConstSpan body);
  void onNews(ProgressToken& token, int source, ConstSpan body);

  // That peer has ended. Returns why, the first cause of a chain.
  const std::string& onPeerEnded(int peer, const std::string& reason);
  // Adds what runs the last messages of those that were lost some time ago: see Note [What the lost held].
  void addLastMessages(Clock::time_point now, std::vector<TaskPtr>& tasks) {
    if (!lost_.empty()) {
      addLastMessagesOfSome(now, tasks);
    }
  }

 private:
  struct Ended {
    int peer;
    Clock::time_point found;
  };
  void failFound(ProgressToken& token);
  void addLastMessagesOfSome(Clock::time_point now, std::vector<TaskPtr>& tasks);
  void tellOthers(ProgressToken& token, const Watch::Finding& lost);

  Transport& transport_;
  Membership& members_;
  Exchange& exchange_;
  Server& server_;
  Join& join_;
  const std::chrono::milliseconds interval_;
  std::shared_ptr<Watch> watch_;

  Clock::time_point nextLook_ = Clock::now();
  std::vector<Ended> ended_;                    // processes of neighbours, not failed yet
  std::unordered_map<int, std::string> causes_; // of the peers that leave because of a loss: why that was
  std::vector<Ended> lost_;                     // peers whose last messages are still to be run
};

} // namespace torch_rpc_mpi
