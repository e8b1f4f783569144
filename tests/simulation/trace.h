// What happened in a run, as a hash that two runs of a seed are compared by, and its end in words.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace torch_rpc_mpi::simulation {

// Takes no memory after begin(): it is used while there is none.
class Trace {
 public:
  // `run` names it in what is printed; `repeat` is the command that repeats it.
  void begin(std::string run, std::string repeat, bool prints);
  // `what` is a literal; the numbers mostly are ranks and calls.
  void note(const char* what, int64_t a = kNothing, int64_t b = kNothing, int64_t c = kNothing);
  uint64_t hash() const {
    return hash_;
  }
  size_t events() const {
    return events_;
  }
  // Prints what was violated, the last events and how to repeat the run, and ends the process: what follows a violation
  // says nothing.
  [[noreturn]] void fail(const std::string& violated) const;
  void printEnd(const char* why) const;

 private:
  static constexpr int64_t kNothing = INT64_MIN;
  struct Event {
    const char* what = "";
    std::array<int64_t, 3> numbers{};
  };
  static void print(size_t index, const Event& event);

  std::string run_, repeat_;
  bool prints_ = false;
  uint64_t hash_ = 0;
  size_t events_ = 0;
  std::array<Event, 256> last_;
};

// That of the run under way: also for what ends the process.
Trace& trace();

} // namespace torch_rpc_mpi::simulation
