// The RpcAgent of backend "MPI": the face of the parts that do the work.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/csrc/distributed/rpc/rpc_agent.h>

#include "agent/agent_options.h"
#include "agent/caller.h"
#include "agent/completion.h"
#include "agent/device_maps.h"
#include "agent/dispatcher.h"
#include "agent/flight_log.h"
#include "agent/join.h"
#include "agent/membership.h"
#include "agent/outbox.h"
#include "agent/server.h"
#include "engine/engine.h"
#include "liveness/watch.h"
#include "peer/exchange.h"
#include "transport/transport.h"

namespace torch_rpc_mpi {

// Thread-safe. Members:
//   options_, transport_ are immutable after construction, watch_ from the start;
//   metricsMutex_ guards the GIL wait; agreed_ and started_ are atomics; farewell_ is for the thread that ends it;
//   the parts guard themselves. They refer to each other, and are made in an order in which none is used too early.
class MpiAgent final : public torch::distributed::rpc::RpcAgent, public std::enable_shared_from_this<MpiAgent> {
 public:
  using WorkerInfo = torch::distributed::rpc::WorkerInfo;

  MpiAgent(
      std::unique_ptr<Transport> transport,
      std::vector<GroupMember> members,
      std::unique_ptr<torch::distributed::rpc::RequestCallback> callback,
      AgentOptions options);
  ~MpiAgent() override;

  JitFuturePtr send(
      const WorkerInfo& to,
      RpcMessage message,
      const float rpcTimeoutSeconds = torch::distributed::rpc::kUnsetRpcTimeout,
      const torch::distributed::rpc::DeviceMap& deviceMap = {}) override;

  // Waits until no call is in flight between any two ranks, all of which must call it. timeout: seconds, 0 for none.
  // Throws when a peer has left, on timeout, and what a signal throws; it can then be called again.
  void join(bool shutdown = false, float timeout = 0) override;
  void sync() override {}
  void startImpl() override;
  // After join(shutdown=true): frees everything. Without: says goodbye to the peers and stops; local and bounded. What
  // a signal throws meanwhile is thrown when all is done.
  void shutdownImpl() override;
  // shutdown() of one that has agreed on nothing, by the process's end and not by torch. farewell: why, for the peers;
  // without it they are told nothing.
  void leave(std::optional<std::string> farewell);

  // Before start(): what knows whether the ranks of other hosts are alive.
  void watchOver(std::shared_ptr<Watch> watch) {
    watch_ = watch;
    dispatcher_.watchOver(std::move(watch));
  }

  // For code that waits for the calls that it makes.
  Caller& caller() {
    return caller_;
  }

  // Throws in a child process made by fork().
  void checkNotForked() const;

  torch::distributed::rpc::DeviceMap getDeviceMap(const WorkerInfo& dst) const override;
  const std::vector<c10::Device>& getDevices() const override;

  using RpcAgent::getWorkerInfo;
  const WorkerInfo& getWorkerInfo(const std::string& workerName) const override;
  const WorkerInfo& getWorkerInfo(torch::distributed::rpc::worker_id_t id) const override;
  std::vector<WorkerInfo> getWorkerInfos() const override;
  std::unordered_map<std::string, std::string> getMetrics() override;
  void addGilWaitTime(const std::chrono::microseconds gilWaitTime) override;
  // Writes the flight recorder's file, to `path` or if that is empty to the next in the directory. Returns its path.
  // Throws std::runtime_error.
  std::string writeFlightRecord(const std::string& path) {
    return flightLog_.write("asked for", path);
  }
  // The workers to which calls can no longer be answered, in the order in which they were lost; this one itself if its
  // transport is broken.
  std::vector<Membership::Loss> lostWorkers() const {
    return members_.lost();
  }

 private:
  JitFuturePtr sendWithFaults(
      int peer,
      RpcMessage message,
      std::chrono::milliseconds timeout,
      std::shared_ptr<OutboundSlices> onDevices);
  std::chrono::milliseconds timeoutOf(float seconds) const;
  std::string notRunningText(torch::distributed::rpc::MessageType type) const;
  std::string whatJoinWaitsFor() const;

  const AgentOptions options_;
  const std::unique_ptr<Transport> transport_;
  Membership members_;
  const DeviceMaps deviceMaps_;
  FlightLog flightLog_;
  Completion completion_;
  Dispatcher dispatcher_;
  Exchange exchange_;
  Outbox outbox_;
  Server server_;
  Caller caller_;
  Join join_;
  const std::shared_ptr<Engine> engine_;
  std::shared_ptr<Watch> watch_; // null where all ranks are on this host

  std::atomic<bool> agreed_{false}; // join(shutdown=true) succeeded
  std::atomic<bool> started_{false};
  std::optional<std::string> farewell_{"it shut RPC down or exited without waiting for the others"};

  std::mutex metricsMutex_;
  uint64_t gilWaits_ = 0;
  uint64_t gilWaitMicroseconds_ = 0;
};

} // namespace torch_rpc_mpi
