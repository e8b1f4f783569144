#include "python/mpi_module.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/deadline.h"
#include "launch/companions.h"
#include "launch/pmi_server.h"
#include "mpi/communicator.h"
#include "mpi/mpi_library.h"
#include "python/finalize_at_exit.h"
#include "python/interpreter.h"
#include "python/signals.h"
#include "python/watchdog.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

// Those that the wait of this thread looks after.
thread_local Companions* watched = nullptr;

class Watching {
 public:
  explicit Watching(Companions* companions) {
    watched = companions;
  }
  ~Watching() {
    watched = nullptr;
  }
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;
};

const SignalService kSignalsAndCompanions{
    [] { return watched != nullptr || kPythonSignals.here(); },
    [] {
      if (kPythonSignals.here()) {
        kPythonSignals.serve();
      }
      if (watched != nullptr) {
        watched->check();
      }
    }};

using WithoutGil = py::call_guard<NoGil>;

// Worlds without a launcher, and whether they come into being.
void bindLaunch(py::module_& module) {
  py::module_::import("torch._C._distributed_c10d"); // holds the class of stores
  // Never destroyed: a child made by fork() would hang up for its parent.
  py::class_<PmiServer, std::unique_ptr<PmiServer, py::nodelete>>(module, "PMIServer")
      .def(
          py::init([](c10d::Store& store, int rank, int size, std::string world, std::string mapping, double timeout,
                      std::shared_ptr<Companions> companions) {
            const auto limit = durationOf<std::chrono::milliseconds>(timeout);
            // By reference and not by its holder, which torch may choose differently in each release.
            return std::unique_ptr<PmiServer, py::nodelete>(new PmiServer(
                c10::intrusive_ptr<c10d::Store>::unsafe_reclaim_from_nonowning(&store),
                PmiPlace{rank, size, std::move(world), std::move(mapping)}, limit, std::move(companions)));
          }),
          py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("world"), py::arg("mapping"), py::arg("timeout"),
          py::arg("companions"))
      .def_property_readonly("client_socket", &PmiServer::clientSocket)
      .def("stop", &PmiServer::stop, WithoutGil())
      .def(
          "serve_alone", [](PmiServer& self, const std::string& whereabouts) { self.serveAlone(whereabouts); },
          py::arg("whereabouts"), WithoutGil());
  py::class_<Companions, std::shared_ptr<Companions>>(module, "Companions")
      .def(
          py::init([](const std::vector<std::pair<pid_t, std::string>>& members) {
            std::vector<Companions::Member> watched;
            for (const auto& [pid, name] : members) {
              watched.push_back({pid, name});
            }
            return std::make_shared<Companions>(std::move(watched));
          }),
          py::arg("members"))
      .def(
          "check", [](Companions& self, double limit) { self.check(durationOf<std::chrono::milliseconds>(limit)); },
          py::arg("limit") = 0.0, WithoutGil());
  py::class_<InitWatchdog>(module, "InitWatchdog")
      .def(
          py::init<std::string, double, double, std::shared_ptr<Companions>, std::string>(), py::arg("what"),
          py::arg("warn_after"), py::arg("abort_after"), py::arg("companions") = nullptr, py::arg("world") = "")
      .def("cancel", &InitWatchdog::cancel, WithoutGil());
}

} // namespace

void bindMpi(py::module_& module) {
  module.def(
      "finalize_at_exit",
      [](uintptr_t initialized, uintptr_t finalized, uintptr_t finalize) {
        return finalizeAtExit(
            {reinterpret_cast<int (*)(int*)>(initialized), reinterpret_cast<int (*)(int*)>(finalized),
             reinterpret_cast<int (*)()>(finalize)});
      },
      py::arg("initialized"), py::arg("finalized"), py::arg("finalize"));
  py::class_<MpiLibrary, std::shared_ptr<MpiLibrary>>(module, "MPIRuntime")
      .def(py::init<std::string, std::string>(), py::arg("shim_path"), py::arg("mpi_extension_path"))
      .def_property_readonly("abi", [](const MpiLibrary& mpi) { return mpi->abi_name; })
      .def("initialized", &MpiLibrary::initialized)
      .def("finalized", &MpiLibrary::finalized)
      .def("thread_level", &MpiLibrary::threadLevel)
      .def("initialize", &MpiLibrary::initialize, WithoutGil())
      .def("library_version", &MpiLibrary::libraryVersion);
  py::class_<Communicator, std::shared_ptr<Communicator>>(module, "Communicator")
      .def_static(
          "duplicate",
          [](std::shared_ptr<MpiLibrary> mpi, intptr_t parent, double timeout, Companions* companions) {
            const Watching watching(companions);
            return Communicator::duplicate(std::move(mpi), parent, timeout, kSignalsAndCompanions);
          },
          py::arg("runtime"), py::arg("parent"), py::arg("timeout"), py::arg("companions"), WithoutGil())
      .def_static("group", &Communicator::group, py::arg("runtime"), py::arg("world"), py::arg("ranks"), WithoutGil())
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def(
          "allgather",
          [](Communicator& self, const py::bytes& data, double timeout, Companions* companions) {
            const std::string mine = data;
            std::vector<std::string> all;
            {
              const NoGil noGil;
              const Watching watching(companions);
              all = self.allgather(mine, timeout, kSignalsAndCompanions);
            }
            std::vector<py::bytes> result(all.begin(), all.end());
            return result;
          },
          py::arg("data"), py::arg("timeout"), py::arg("companions"))
      .def("free", &Communicator::free, WithoutGil());
  bindLaunch(module);
}

} // namespace torch_rpc_mpi
