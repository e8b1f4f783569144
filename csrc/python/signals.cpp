#include "python/signals.h"

#include <atomic>
#include <mutex>

#include <torch/csrc/utils/pybind.h>

#include "python/interpreter.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

std::atomic<pthread_t> mainThread{};

bool inMainThread() {
  return pthread_equal(pthread_self(), mainThread.load(std::memory_order_relaxed)) != 0;
}

void runHandlers() {
  if (!interpreterRuns()) {
    return;
  }
  const Gil gil;
  if (PyErr_CheckSignals() != 0) {
    throw py::error_already_set();
  }
}

} // namespace

const SignalService kPythonSignals{inMainThread, runHandlers};

pthread_t pythonsMainThread() {
  return mainThread.load(std::memory_order_relaxed);
}

void findPythonsMainThread() {
  const auto threading = py::module_::import("threading");
  mainThread = static_cast<pthread_t>(threading.attr("main_thread")().attr("ident").cast<unsigned long>());
  static std::once_flag once;
  // The thread that forks is the child's only one, and so Python's main thread there.
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { mainThread = pthread_self(); }); });
}

} // namespace torch_rpc_mpi
