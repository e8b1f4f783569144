// The Python face of the core. With python_functions.cpp the only place that knows Python.
#include <algorithm>
#include <bit>
#include <cmath>
#include <string_view>

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "agent/autograd_sessions.h"
#include "agent/engine_work.h"
#include "agent/future_wait.h"
#include "agent/mpi_agent.h"
#include "base/deadline.h"
#include "host/fork_guard.h"
#include "host/resources.h"
#include "mpi/mpi_transport.h"
#include "python/device_module.h"
#include "python/functions_module.h"
#include "python/futures_module.h"
#include "python/interpreter.h"
#include "python/interruptible_wait.h"
#include "python/job_end.h"
#include "python/mpi_module.h"
#include "python/python_error.h"
#include "python/request_callback.h"
#include "python/second_interrupt.h"
#include "python/signals.h"
#include "python/user_code.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

namespace rpc = torch::distributed::rpc;

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

// AgentOptions as Python sees them: seconds.
struct PyAgentOptions {
  int numWorkerThreads = AgentOptions().numWorkerThreads;
  double rpcTimeout = rpc::kDefaultRpcTimeoutSeconds;
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
  std::vector<std::pair<rpc::DeviceMap, rpc::DeviceMap>> deviceMaps; // of requests and responses, by rank; or none
  FaultOptions faults;

  // neighbours: by rank.
  AgentOptions toCore(int worldSize, int ranksOnHost, std::vector<bool> neighbours) const {
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
      options.devices = std::make_shared<Devices>(devices, bulkChunk, mpiTakesDeviceMemory);
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
    if (!faults.messagesToFail.empty() || !faults.messagesToDelay.empty()) {
      options.faults = std::make_shared<Faults>(faults);
    }
    return options;
  }
};

// `function`, which takes (rank, reason) and raises nothing, for the engine's threads.
AgentOptions::OnWorkerLost lossListener(py::object function) {
  return [held = shared(std::move(function))](int rank, const std::string& reason) {
    if (interpreterRuns()) {
      const Gil gil;
      const UserCode code;
      (void)callToTheEndOfPython(*held, py::make_tuple(rank, reason));
    }
  };
}

std::shared_ptr<MpiAgent> makeAgent(
    const std::shared_ptr<Communicator>& communicator,
    const std::vector<std::string>& names,
    const std::vector<std::string>& hosts,
    const std::shared_ptr<Neighbours>& neighbours,
    const std::vector<std::string>& addresses,
    const PyAgentOptions& options,
    py::object runFunction,
    py::object serialize,
    py::object passOn,
    py::object plainPickler,
    py::object onWorkerLost) {
  TORCH_CHECK(
      names.size() == hosts.size() && names.size() == addresses.size() &&
          names.size() == static_cast<size_t>(communicator->size()),
      "one name, host and address are needed for each of the ", communicator->size(), " ranks");
  neighbours->meet(addresses, communicator->rank());
  std::vector<GroupMember> members;
  for (size_t rank = 0; rank < names.size(); ++rank) {
    members.push_back({names[rank], hosts[rank]});
  }
  const auto ranksOnHost = std::count(hosts.begin(), hosts.end(), hosts[communicator->rank()]);
  auto callback = std::make_unique<PythonRequestCallback>(
      std::move(runFunction), std::move(serialize), std::move(passOn), std::move(plainPickler));
  auto& requests = *callback;
  std::vector<bool> shares(names.size());
  for (size_t rank = 0; rank < names.size(); ++rank) {
    shares[rank] = !addresses[rank].empty() && static_cast<int>(rank) != communicator->rank();
  }
  AgentOptions agentOptions = options.toCore(communicator->size(), static_cast<int>(ranksOnHost), std::move(shares));
  agentOptions.onWorkerLost = lossListener(std::move(onWorkerLost));
  std::shared_ptr<MpiAgent> agent(
      new MpiAgent(
          std::make_unique<MpiTransport>(communicator, neighbours, options.anySource), std::move(members),
          std::move(callback), std::move(agentOptions)),
      torch::impl::destroy_without_gil<MpiAgent>);
  requests.setAgent(*agent);
  return agent;
}

void watchOtherHosts(
    MpiAgent& agent,
    std::shared_ptr<Watch> watch,
    std::shared_ptr<Neighbours> neighbours,
    std::vector<std::string> addresses,
    std::vector<int> hosts,
    std::string secret,
    double heartbeatTimeout) {
  watch->start(
      {.self = agent.getWorkerInfo().id_,
       .addresses = std::move(addresses),
       .hosts = std::move(hosts),
       .secret = std::move(secret),
       .heartbeatTimeout = durationOf<std::chrono::milliseconds>(heartbeatTimeout),
       .hasEnded = [neighbours = std::move(neighbours)](int rank) {
         return neighbours->hasEnded(rank, std::chrono::milliseconds(0));
       }});
  agent.watchOver(std::move(watch));
}

// For the length of a session. It waits for an answer, perhaps, who does nothing while some are missing.
std::unique_ptr<SecondInterrupt> watchForSecondInterrupt(
    const std::shared_ptr<MpiAgent>& agent,
    const std::string& whereabouts,
    const std::shared_ptr<MpiLibrary>& job,
    intptr_t world) {
  constexpr double kIdle = 0.1;
  SecondInterrupt::EndJob endJob;
  if (job != nullptr) {
    endJob = [job, world](int status) { job->abort(world, status); };
  }
  return std::make_unique<SecondInterrupt>(
      whereabouts +
          " ended by a second Ctrl-C, because the first cannot interrupt its main thread, which waits in C++ code that "
          "lets no signal through (TorchScript or distributed autograd, for instance)",
      [weak = std::weak_ptr<MpiAgent>(agent)](double busy) {
        const auto current = weak.lock();
        return busy < kIdle && current != nullptr && current->caller().unanswered() > 0;
      },
      endJob);
}

// In a forked child there is nothing to shut down, and no thread that could be joined.
void shutdownAgent(MpiAgent& agent) {
  if (!inForkedChild()) {
    agent.shutdown();
  }
}

void leave(MpiAgent& agent, std::optional<std::string> farewell) {
  if (!inForkedChild()) {
    agent.leave(std::move(farewell));
  }
}

rpc::WorkerInfo ownWorkerInfo(const MpiAgent& agent) {
  agent.checkNotForked(); // much of torch's API passes here first, also what would only wait
  return agent.getWorkerInfo();
}

void bindAgent(py::module_& module) {
  using WithoutGil = py::call_guard<NoGil>;
  py::class_<Neighbours, std::shared_ptr<Neighbours>>(module, "Neighbours")
      .def(py::init<>())
      .def_property_readonly("address", &Neighbours::address)
      .def_property_readonly("reaches_all", &Neighbours::reachesAll)
      .def_property_readonly("host", &Neighbours::host)
      .def("ring_each_other", &Neighbours::ringEachOther);
  py::class_<Watch, std::shared_ptr<Watch>>(module, "HostWatch")
      .def(py::init<>())
      .def_property_readonly("address", &Watch::address);
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

  // torch's own module holds the base class; it must be known before ours.
  py::module_::import("torch._C._distributed_rpc");
  py::class_<MpiAgent, rpc::RpcAgent, std::shared_ptr<MpiAgent>>(module, "MPIAgent")
      .def(
          py::init(&makeAgent), py::arg("communicator"), py::arg("names"), py::arg("hosts"), py::arg("neighbours"),
          py::arg("addresses"), py::arg("options"), py::arg("run_function"), py::arg("serialize"), py::arg("pass_on"),
          py::arg("plain_pickler"), py::arg("on_worker_lost"))
      .def("join", &MpiAgent::join, py::arg("shutdown") = false, py::arg("timeout") = 0, WithoutGil())
      .def("shutdown", &shutdownAgent, WithoutGil())
      .def("sync", &MpiAgent::sync, WithoutGil())
      .def("leave", &leave, py::arg("farewell"), WithoutGil())
      .def(
          "expect_answer", [](MpiAgent& self, bool expected) { self.caller().expectAnswer(expected); },
          py::arg("expected"))
      .def(
          "wait",
          [](MpiAgent& self, torch::jit::PythonFutureWrapper& future) {
            self.caller().driveUntil(*future.fut);
            waitServingSignals(*future.fut);
            return future.wait(); // takes the GIL for what it returns
          },
          py::arg("future"), WithoutGil())
      .def("get_worker_info", &ownWorkerInfo, WithoutGil())
      .def(
          "get_worker_info", [](const MpiAgent& self, const std::string& name) { return self.getWorkerInfo(name); },
          WithoutGil())
      .def(
          "get_worker_info", [](const MpiAgent& self, rpc::worker_id_t id) { return self.getWorkerInfo(id); },
          WithoutGil())
      .def("get_worker_infos", &MpiAgent::getWorkerInfos, WithoutGil())
      .def(
          "lost_workers",
          [](const MpiAgent& self) {
            std::vector<std::pair<int, std::string>> lost;
            for (Membership::Loss& loss : self.lostWorkers()) {
              lost.emplace_back(loss.rank, std::move(loss.cause));
            }
            return lost;
          },
          WithoutGil())
      .def(
          "watch_other_hosts", &watchOtherHosts, py::arg("watch"), py::arg("neighbours"), py::arg("addresses"),
          py::arg("hosts"), py::arg("secret"), py::arg("heartbeat_timeout"), WithoutGil())
      .def("write_flight_record", &MpiAgent::writeFlightRecord, py::arg("path"), WithoutGil())
      .def("get_metrics", &MpiAgent::getMetrics, WithoutGil())
      .def("get_debug_info", &MpiAgent::getDebugInfo, WithoutGil())
      .def("get_device_map", &MpiAgent::getDeviceMap, py::arg("worker"), WithoutGil())
      .def("_get_device_map", &MpiAgent::getDeviceMap, py::arg("dst"), WithoutGil()) // as RemoteModule asks
      .def("get_devices", [](const MpiAgent& self) { return self.getDevices(); });
  module.def(
      "end_job_at_exit", &endJobAtExit, py::arg("runtime"), py::arg("world"), py::arg("text"), py::arg("status"),
      py::arg("limit"));
  py::class_<SecondInterrupt>(module, "SecondInterrupt")
      .def(
          py::init(&watchForSecondInterrupt), py::arg("agent"), py::arg("whereabouts"), py::arg("job"),
          py::arg("world"))
      .def("cancel", &SecondInterrupt::cancel, WithoutGil());
  module.def("message_type_names", &messageTypeNames);
  module.def("forks_made", [](const std::vector<std::pair<rpc::worker_id_t, rpc::local_id_t>>& ids) {
    std::vector<HeldByPeers::ForkId> forks;
    for (const auto& [worker, number] : ids) {
      forks.emplace_back(worker, number);
    }
    HeldByPeers::made(std::move(forks));
  });
  module.def("forget_autograd_worker_id", &forgetAutogradWorkerId, py::arg("worker_id"), WithoutGil());
  module.def("usable_cores", [] { return usableCores(); });
  module.def("usable_memory", [] { return usableMemory(); });
  module.def("cgroup_limits", [] {
    const CgroupLimits limits = cgroupLimits();
    return std::make_tuple(limits.memoryBytes, limits.cores, limits.tasks);
  });
}

void translateExceptions() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) {
        std::rethrow_exception(pointer);
      }
    } catch (const MissingRanks& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    }
  });
}

} // namespace

PYBIND11_MODULE(_C, module) {
  translateExceptions();
  translatePythonErrors();
  bindDevices(module);
  bindMpi(module);
  bindAgent(module);
  bindFunctions(module);
  bindFutures(module);
  bindInterruptibleWaits(module);
  // With words that the file is searched for where it does not load: load_extension() in _mpi.py.
  static constexpr std::string_view kBuiltFor = "torch_rpc_mpi was built for torch " TORCH_VERSION;
  module.attr("__torch_version__") = kBuiltFor.substr(kBuiltFor.rfind(' ') + 1);
}

} // namespace torch_rpc_mpi
