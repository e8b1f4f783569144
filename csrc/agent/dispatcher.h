// What the engine drives: a turn of the exchange, and each thing that comes of it to the part of the agent that it is
// for.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "agent/agent_options.h"
#include "agent/caller.h"
#include "agent/device_lending.h"
#include "agent/flight_log.h"
#include "agent/join.h"
#include "agent/losses.h"
#include "agent/membership.h"
#include "agent/outbox.h"
#include "agent/server.h"
#include "engine/engine.h"
#include "liveness/watch.h"
#include "peer/exchange.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

// arrivals_, now_ and nextTrim_ are guarded by the progress token, what losses_ and lending_ know as well; rests_ and
// awaitsDevice_ are atomics; the rest is immutable, or guards itself.
class Dispatcher final : public EngineDriver, public ExchangeListener {
 public:
  // Of parts of an agent that need not be there yet. watchInterval: how often to look whether neighbours are alive.
  Dispatcher(
      Transport& transport,
      Membership& members,
      Exchange& exchange,
      Outbox& outbox,
      Server& server,
      Caller& caller,
      Join& join,
      FlightLog& flightLog,
      const AgentOptions::OnWorkerLost& onWorkerLost,
      std::chrono::milliseconds watchInterval,
      std::shared_ptr<Devices> devices);

  // Before the engine starts: who tells of the ranks of other hosts. Null: nobody, as all are on this one.
  void watchOver(std::shared_ptr<Watch> watch) {
    losses_.watchOver(std::move(watch));
  }

  // Tasks of a turn that nobody took.
  std::vector<TaskPtr> takeArrivals(ProgressToken& /*token*/) {
    return std::exchange(arrivals_, {});
  }

  // EngineDriver
  bool turn(ProgressToken& token, std::vector<TaskPtr>& tasks) override;
  bool hasQueued() const override;
  Clock::time_point nextDeadline() const override;
  bool awaitsAnswers() const override;
  bool rests() const override;
  bool awaitsDevice() const override;
  void onBroken(const std::string& reason, std::vector<TaskPtr>& tasks) noexcept override;

 private:
  // ExchangeListener
  std::unique_ptr<BulkTarget> makeTarget(int source, const FrameHeader& header, ConstSpan body) override;
  void onMessage(ProgressToken& token, InboundMessage&& message) override;
  void onStrayFrame(int source, const std::string& reason) override;
  std::string failureText(int peer, const std::string& cause) const override;
  void onPeerEnded(ProgressToken& token, int peer, const std::string& reason) override;

  void keepLoans(InboundMessage& message) const;
  void answerInquiry(ProgressToken& token, int source, ConstSpan body);
  void failForNonsense(ProgressToken& token, int source, const std::string& what);
  bool progress(ProgressToken& token); // a turn, but for handing over arrivals_
  bool idle(ProgressToken& token) const;

  Transport& transport_;
  Membership& members_;
  Exchange& exchange_;
  Outbox& outbox_;
  Server& server_;
  Caller& caller_;
  Join& join_;
  FlightLog& flightLog_;
  const AgentOptions::OnWorkerLost& onWorkerLost_;
  const std::shared_ptr<Devices> devices_; // null: none are used
  Losses losses_;
  DeviceLending lending_;

  std::vector<TaskPtr> arrivals_;        // made during a turn
  Clock::time_point now_ = Clock::now(); // of the last turn
  Clock::time_point nextTrim_ = now_;
  std::atomic<bool> rests_{false};
  std::atomic<bool> awaitsDevice_{false};
};

} // namespace torch_rpc_mpi
