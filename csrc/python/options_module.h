// The options of a session in Python.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/utils/pybind.h>

#include "agent/agent_options.h"

namespace torch_rpc_mpi {

// AgentOptions as Python sees them: seconds.
struct PyAgentOptions {
  int numWorkerThreads = AgentOptions().numWorkerThreads;
  double rpcTimeout = torch::distributed::rpc::kDefaultRpcTimeoutSeconds;
  size_t eagerLimit = ExchangeOptions().eagerLimit;
  size_t bulkChunk = ExchangeOptions().bulkChunk;
  double spinTime = 0.001;
  double maxSleep = 0.001;
  bool anySource = true;
  std::string flightRecorderDir;
  std::vector<c10::Device> devices;
  std::vector<std::string> deviceNames; // UUIDs of all that this process sees; none: no memory is shared
  size_t deviceMemory = 0;              // bytes, of the smallest of them
  bool mpiTakesDeviceMemory = false;
  std::vector<std::pair<torch::distributed::rpc::DeviceMap, torch::distributed::rpc::DeviceMap>>
      deviceMaps; // of requests and responses, by rank; or none
  FaultOptions faults;

  // neighbours: by rank.
  AgentOptions toCore(int worldSize, int ranksOnHost, std::vector<bool> neighbours) const;
};

void bindOptions(pybind11::module_& module);

} // namespace torch_rpc_mpi
