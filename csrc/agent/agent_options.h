// The settings of an agent.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/distributed/rpc/rpc_agent.h>

#include "agent/faults.h"
#include "base/signal_service.h"
#include "device/devices.h"
#include "engine/engine.h"
#include "peer/peer_context.h"

namespace torch_rpc_mpi {

// From a device of this worker to one of a peer: of requests that this worker makes, of responses that it gives.
struct DeviceMapOfPeer {
  torch::distributed::rpc::DeviceMap requests, responses;
};

struct AgentOptions {
  int numWorkerThreads = 16;
  std::chrono::milliseconds rpcTimeout{60000};
  ExchangeOptions exchange;
  int coresToSpare = 1; // see Note [How many at once]
  int ranksOnHost = 1;
  IdlingOptions idling;
  std::chrono::milliseconds watchInterval{100}; // how often to look whether neighbours are alive
  std::shared_ptr<Devices> devices;             // null: none are used
  std::vector<DeviceMapOfPeer> deviceMaps = {}; // by rank; none: there are none
  std::function<void(const std::function<void()>& body)> threadHook = [](const std::function<void()>& body) { body(); };
  // Told of a worker that was lost, in a task of the engine.
  using OnWorkerLost = std::function<void(int rank, const std::string& reason)>;
  OnWorkerLost onWorkerLost = [](int, const std::string&) {};
  // Given a response that nobody awaits any more: in a task of the engine, or, of a call to oneself, in the thread that
  // completes it.
  using OnLateResponse = std::function<void(const torch::distributed::rpc::Message& response)>;
  OnLateResponse onLateResponse = [](const torch::distributed::rpc::Message&) {};
  std::string flightRecorderDir;  // empty: none
  SignalService signals;          // of threads that wait here
  uint32_t slotUsesBefore = 0;    // see CallTable
  std::shared_ptr<Faults> faults; // null but in tests
  MakeEngine makeEngine = makeThreadedEngine;
};

} // namespace torch_rpc_mpi
