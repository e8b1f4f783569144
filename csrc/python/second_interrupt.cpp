#include "python/second_interrupt.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <thread>
#include <utility>

#include <pthread.h>
#include <semaphore.h>
#include <time.h>
#include <unistd.h>

#include <c10/util/Logging.h>
#include <torch/csrc/utils/pybind.h>

#include "base/clock.h"
#include "host/launcher_output.h"
#include "host/resources.h"
#include "python/interpreter.h"
#include "python/signals.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

// One key press may come as several signals: from the terminal, and passed on by the launcher.
constexpr auto kOneKeyPress = std::chrono::milliseconds(100);
// So long Python has for the first signal, before another one ends the process.
constexpr auto kPatience = std::chrono::milliseconds(300);

// The handler may run when an object has just been cancelled, so what it uses lives for ever.
struct sigaction pythonsHandler;
sem_t interrupts; // posted by each SIGINT, and to end the thread that watches

std::atomic<bool> inUse{false};
std::atomic<bool> ending{false};
std::thread* watcher = nullptr; // not destroyed when the process ends, in the middle of its work

// How many pending calls were asked for, and the last of them that was made.
uintptr_t asked = 0;
std::atomic<uintptr_t> made{0};

// Async-signal-safe.
void onInterrupt(int number, siginfo_t* info, void* context) {
  const int error = errno;
  if ((pythonsHandler.sa_flags & SA_SIGINFO) != 0) {
    pythonsHandler.sa_sigaction(number, info, context);
  } else if (pythonsHandler.sa_handler != SIG_DFL && pythonsHandler.sa_handler != SIG_IGN) {
    pythonsHandler.sa_handler(number);
  }
  sem_post(&interrupts);
  errno = error;
}

bool isOurs(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == onInterrupt;
}

int onPythonRuns(void* number) {
  made = reinterpret_cast<uintptr_t>(number);
  return 0;
}

// Of CPU time, in seconds.
double usedByMainThread() {
  clockid_t clock{};
  timespec used{};
  if (pthread_getcpuclockid(pythonsMainThread(), &clock) != 0 || clock_gettime(clock, &used) != 0) {
    return 0;
  }
  return static_cast<double>(used.tv_sec) + static_cast<double>(used.tv_nsec) * 1e-9;
}

[[noreturn]] void endProcess(const std::string& text, const SecondInterrupt::EndJob& endJob) {
  std::fprintf(stderr, "torch_rpc_mpi: %s. Ending this process.\n", text.c_str());
  std::fflush(stderr);
  if (endJob) { // launchers do not notice every process that a signal has ended
    waitUntilRead(STDERR_FILENO);
    endJob(128 + SIGINT);
  }
  std::signal(SIGINT, SIG_DFL);
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_UNBLOCK, &interrupt, nullptr);
  raise(SIGINT);
  _exit(128 + SIGINT);
}

// A SIGINT that Python has not acted upon yet.
struct First {
  Clock::time_point when;
  double used;
};

void watch(const std::string& text, const SecondInterrupt::Waits& waits, const SecondInterrupt::EndJob& endJob) {
  std::optional<First> first;
  for (;;) {
    while (sem_wait(&interrupts) != 0) {
    }
    if (ending) {
      return;
    }
    const auto now = Clock::now();
    if (!first || made == asked) {
      first = First{now, usedByMainThread()};
      ++asked;
      if (!interpreterRuns() || Py_AddPendingCall(onPythonRuns, reinterpret_cast<void*>(asked)) != 0) {
        made = asked; // cannot be told
      }
      continue;
    }
    if (now - first->when < kOneKeyPress) {
      continue;
    }
    std::this_thread::sleep_until(first->when + kPatience);
    const std::chrono::duration<double> since = Clock::now() - first->when;
    if (made != asked && !ending && waits((usedByMainThread() - first->used) / since.count())) {
      endProcess(text, endJob);
    }
  }
}

} // namespace

SecondInterrupt::SecondInterrupt(std::string text, Waits waits, EndJob endJob) {
  const auto signals = py::module_::import("signal");
  if (!signals.attr("getsignal")(SIGINT).is(signals.attr("default_int_handler")) || inUse.exchange(true)) {
    return;
  }
  active_ = true;
  ending = false;
  made = asked; // of an earlier object, which nobody waits for
  sem_init(&interrupts, 0, 0);
  try {
    watcher = new std::thread(startThreadWithoutSignals(
        "what ends this process at a second Ctrl-C", [text, waits, endJob] { watch(text, waits, endJob); }));
  } catch (const std::exception& error) { // it does without
    active_ = false;
    inUse = false;
    LOG(WARNING) << "A second Ctrl-C will not end this process: " << error.what();
    return;
  }
  sigaction(SIGINT, nullptr, &pythonsHandler);
  struct sigaction ours = pythonsHandler;
  ours.sa_flags |= SA_SIGINFO;
  ours.sa_sigaction = onInterrupt;
  sigaction(SIGINT, &ours, nullptr);
}

SecondInterrupt::~SecondInterrupt() {
  cancel();
}

void SecondInterrupt::cancel() {
  if (!std::exchange(active_, false)) {
    return;
  }
  struct sigaction current;
  sigaction(SIGINT, nullptr, &current);
  if (isOurs(current)) {
    sigaction(SIGINT, &pythonsHandler, nullptr);
  }
  ending = true;
  sem_post(&interrupts);
  watcher->join();
  delete watcher;
  inUse = false;
}

} // namespace torch_rpc_mpi
