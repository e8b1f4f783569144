#include "python/options_module.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <memory>

#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/deadline.h"
#include "host/resources.h"
#include "python/interpreter.h"
#include "python/response.h"
#include "python/signals.h"
#include "python/user_code.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

std::vector<DeviceName> namesOf(const std::vector<std::string>& texts) {
  std::vector<DeviceName> names(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    std::copy_n(texts[i].begin(), std::min(texts[i].size(), names[i].size() - 1), names[i].begin());
  }
  return names;
}

// Of the regions in which a sender lends memory: together they are less than twice the largest, and so no more than a
// 64th of the device's memory, nor than 1 GiB.
size_t largestRegion(size_t deviceMemory) {
  constexpr size_t kSmallest = size_t{64} << 20;
  constexpr size_t kLargest = size_t{512} << 20;
  return std::bit_floor(std::clamp(deviceMemory / 128, kSmallest, kLargest));
}

} // namespace

AgentOptions PyAgentOptions::toCore(int worldSize, int ranksOnHost, std::vector<bool> neighbours) const {
  AgentOptions options;
  const int cores = usableCores(); // launchers often bind a rank to a few
  options.coresToSpare = std::clamp(cores / std::max(ranksOnHost, 1) / 2, 1, 4);
  options.idling.scarce = options.coresToSpare == 1;
  options.idling.crowded = ranksOnHost > cores;
  options.ranksOnHost = std::max(ranksOnHost, 1);
  options.numWorkerThreads = numWorkerThreads;
  options.rpcTimeout = std::chrono::milliseconds(std::llround(std::min(rpcTimeout, kLongestWait) * 1000));
  if (rpcTimeout > 0 && options.rpcTimeout.count() == 0) {
    options.rpcTimeout = std::chrono::milliseconds(1); // 0 would mean none
  }
  options.exchange.eagerLimit = eagerLimit;
  options.exchange.bulkChunk = bulkChunk;
  // What all peers together may have waiting here stays bounded; each may always have something.
  constexpr size_t kAllPeers = size_t{48} << 20;
  constexpr size_t kOnePeer = size_t{16} << 20;
  constexpr size_t kAtLeast = size_t{1} << 20;
  const size_t eachPeer = kAllPeers / static_cast<size_t>(std::max(worldSize - 1, 1));
  options.exchange.windowBytes = std::clamp(eachPeer, kAtLeast, kOnePeer);
  options.exchange.windowRequests =
      std::clamp(eachPeer / options.exchange.frameBytes(), size_t{32}, ExchangeOptions().windowRequests);
  options.idling.spinTime = durationOf<std::chrono::nanoseconds>(spinTime);
  options.idling.maxSleep = durationOf<std::chrono::nanoseconds>(maxSleep);
  options.flightRecorderDir = flightRecorderDir;
  if (!devices.empty()) {
    options.devices = std::make_shared<Devices>(
        DeviceRuntime::find(devices.front().type()), devices, bulkChunk, mpiTakesDeviceMemory);
    if (!deviceNames.empty()) {
      options.devices->share(namesOf(deviceNames), std::move(neighbours), largestRegion(deviceMemory));
    }
  }
  for (const auto& [requests, responses] : deviceMaps) {
    options.deviceMaps.push_back({requests, responses});
  }
  options.threadHook = withPythonThreadState;
  if (!devices.empty()) {
    // A thread begins on device 0, and torch's guards go back to where they were, which makes a context there.
    options.threadHook = [device = devices.front()](const std::function<void()>& body) {
      c10::impl::VirtualGuardImpl(device.type()).uncheckedSetDevice(device); // which makes none
      withPythonThreadState(body);
    };
  }
  options.signals = kPythonSignals;
  options.onLateResponse = letGoOf;
  if (!faults.messagesToFail.empty() || !faults.messagesToDelay.empty()) {
    options.faults = std::make_shared<Faults>(faults);
  }
  return options;
}

void bindOptions(py::module_& module) {
  py::class_<PyAgentOptions>(module, "AgentOptions")
      .def(py::init<>())
      .def_readwrite("num_worker_threads", &PyAgentOptions::numWorkerThreads)
      .def_readwrite("rpc_timeout", &PyAgentOptions::rpcTimeout)
      .def_readwrite("eager_limit", &PyAgentOptions::eagerLimit)
      .def_readwrite("bulk_chunk", &PyAgentOptions::bulkChunk)
      .def_readwrite("spin_time", &PyAgentOptions::spinTime)
      .def_readwrite("max_sleep", &PyAgentOptions::maxSleep)
      .def_readwrite("any_source", &PyAgentOptions::anySource)
      .def_readwrite("flight_recorder_dir", &PyAgentOptions::flightRecorderDir)
      .def_readwrite("devices", &PyAgentOptions::devices)
      .def_readwrite("device_memory", &PyAgentOptions::deviceMemory)
      .def_readwrite("mpi_takes_device_memory", &PyAgentOptions::mpiTakesDeviceMemory)
      .def_readwrite("device_names", &PyAgentOptions::deviceNames)
      .def_readwrite("device_maps", &PyAgentOptions::deviceMaps)
      .def_property(
          "messages_to_fail", [](const PyAgentOptions& self) { return self.faults.messagesToFail; },
          [](PyAgentOptions& self, std::vector<std::string> names) { self.faults.messagesToFail = std::move(names); })
      .def_property(
          "messages_to_delay", [](const PyAgentOptions& self) { return self.faults.messagesToDelay; },
          [](PyAgentOptions& self, std::unordered_map<std::string, double> delays) {
            self.faults.messagesToDelay = std::move(delays);
          })
      .def_property(
          "num_fail_sends", [](const PyAgentOptions& self) { return self.faults.numFailSends; },
          [](PyAgentOptions& self, int sends) { self.faults.numFailSends = sends; });
  module.def("message_type_names", &messageTypeNames);
}

} // namespace torch_rpc_mpi
