// Runs seeds. A seed alone decides all that happens in its run, so one that fails is a test.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include <c10/util/Logging.h>
#include <unistd.h>

#include "trace.h"
#include "world.h"

using namespace torch_rpc_mpi::simulation;

namespace {

constexpr unsigned kSecondsOfAHang = 60;
constexpr uint64_t kRunTwice = 101; // one of so many

struct Arguments {
  uint64_t from = 0, to = 1000;
  bool trace = false;
  const Scenario* scenario = nullptr; // null: by the seed
};

[[noreturn]] void usage() {
  std::fprintf(stderr, "--seeds FROM TO | --seed N [--trace] [--scenario NAME]; the scenarios:");
  for (const Scenario& scenario : scenarios()) {
    std::fprintf(stderr, " %s", scenario.name.c_str());
  }
  std::fprintf(stderr, "\n");
  std::exit(2);
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&] { return ++i < argc ? argv[i] : (usage(), nullptr); };
    if (name == "--seeds") {
      arguments.from = std::strtoull(value(), nullptr, 10);
      arguments.to = std::strtoull(value(), nullptr, 10);
    } else if (name == "--seed") {
      arguments.from = std::strtoull(value(), nullptr, 10);
      arguments.to = arguments.from + 1;
    } else if (name == "--trace") {
      arguments.trace = true;
    } else if (name == "--scenario") {
      arguments.scenario = findScenario(value());
      if (arguments.scenario == nullptr) {
        usage();
      }
    } else {
      usage();
    }
  }
  return arguments;
}

void onDeath() {
  trace().printEnd("the process ends");
}

// With what a sanitizer finds, a terminate() or a hang, the run has to be told as well.
void nameTheRunAtTheEnd() {
  std::set_terminate([] {
    try {
      std::rethrow_exception(std::current_exception());
    } catch (const std::exception& error) {
      std::fprintf(stderr, "terminate() for: %s\n", error.what());
    }
    onDeath();
    std::abort();
  });
  std::signal(SIGALRM, [](int) {
    trace().printEnd("it hangs");
    std::_Exit(1);
  });
}

struct Result {
  uint64_t hash;
  size_t steps;
};

Result run(uint64_t seed, const Arguments& arguments, UserThreads& threads) {
  const Scenario& scenario =
      arguments.scenario != nullptr ? *arguments.scenario : scenarios()[seed % scenarios().size()];
  const std::string number = std::to_string(seed);
  trace().begin(
      "seed " + number + " of scenario " + scenario.name,
      "torch_rpc_mpi_simulation --trace --seed " + number + " --scenario " + scenario.name, arguments.trace);
  alarm(kSecondsOfAHang);
  World world(seed, scenario, threads);
  world.run();
  alarm(0);
  return {trace().hash(), world.steps()};
}

} // namespace

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_set_death_callback(void (*callback)());
// What MPI might still touch is kept for ever, of every run.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options();
const char* __asan_default_options() {
  return "detect_leaks=0";
}
#endif

int main(int argc, char** argv) {
  const Arguments arguments = parse(argc, argv);
  setenv("TORCH_CPP_LOG_LEVEL", "FATAL", /*overwrite=*/0); // errors are what happens here
  c10::initLogging();
  nameTheRunAtTheEnd();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(onDeath);
#endif
  UserThreads threads;
  // First what a process makes once, tables and caches: where memory runs out depends on it.
  (void)run(0, {.scenario = findScenario("calm")}, threads);
  const auto begin = std::chrono::steady_clock::now();
  size_t steps = 0;
  for (uint64_t seed = arguments.from; seed < arguments.to; ++seed) {
    const Result result = run(seed, arguments, threads);
    steps += result.steps;
    if (seed % kRunTwice == 1 && run(seed, arguments, threads).hash != result.hash) {
      trace().fail("the same seed gives another trace");
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const auto seeds = static_cast<double>(arguments.to - arguments.from);
  std::printf(
      "%.0f seeds hold, %.0f a second, %.0f steps each\n", seeds, seeds / seconds, static_cast<double>(steps) / seeds);
  return 0;
}
