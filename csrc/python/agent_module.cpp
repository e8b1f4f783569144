#include "python/agent_module.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <torch/csrc/jit/python/pybind_utils.h>

#include "agent/autograd_sessions.h"
#include "agent/mpi_agent.h"
#include "base/deadline.h"
#include "host/fork_guard.h"
#include "host/termination.h"
#include "mpi/mpi_transport.h"
#include "python/interpreter.h"
#include "python/interruptible_wait.h"
#include "python/job_end.h"
#include "python/options_module.h"
#include "python/request_callback.h"
#include "python/second_interrupt.h"
#include "python/user_code.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

namespace rpc = torch::distributed::rpc;
using WithoutGil = py::call_guard<NoGil>;

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

void bindHosts(py::module_& module) {
  py::class_<Neighbours, std::shared_ptr<Neighbours>>(module, "Neighbours")
      .def(py::init<>())
      .def_property_readonly("address", &Neighbours::address)
      .def_property_readonly("reaches_all", &Neighbours::reachesAll)
      .def_property_readonly("host", &Neighbours::host)
      .def("ring_each_other", &Neighbours::ringEachOther);
  py::class_<Watch, std::shared_ptr<Watch>>(module, "HostWatch")
      .def(py::init<>())
      .def_property_readonly("address", &Watch::address);
}

// What torch keeps from one session to the next.
void bindSessions(py::module_& module) {
  module.def("forks_made", [](const std::vector<std::pair<rpc::worker_id_t, rpc::local_id_t>>& ids) {
    std::vector<HeldByPeers::ForkId> forks;
    for (const auto& [worker, number] : ids) {
      forks.emplace_back(worker, number);
    }
    HeldByPeers::made(std::move(forks));
  });
  module.def("forget_autograd_worker_id", &forgetAutogradWorkerId, py::arg("worker_id"), WithoutGil());
}

void bindEnd(py::module_& module) {
  module.def(
      "end_job_at_exit", &endJobAtExit, py::arg("runtime"), py::arg("world"), py::arg("text"), py::arg("status"),
      py::arg("limit"));
  py::class_<SecondInterrupt>(module, "SecondInterrupt")
      .def(
          py::init(&watchForSecondInterrupt), py::arg("agent"), py::arg("whereabouts"), py::arg("job"),
          py::arg("world"))
      .def("cancel", &SecondInterrupt::cancel, WithoutGil());
  py::class_<TerminationNotice>(module, "TerminationNotice")
      .def(py::init<std::string_view, bool>(), py::arg("line"), py::arg("when_parent_ends"))
      .def("cancel", &TerminationNotice::cancel);
}

} // namespace

void bindAgent(py::module_& module) {
  bindHosts(module);
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
  bindSessions(module);
  bindEnd(module);
}

} // namespace torch_rpc_mpi
