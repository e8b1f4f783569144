#include "trace.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace torch_rpc_mpi::simulation {

namespace {

constexpr uint64_t kFnvStart = 14695981039346656037U;
constexpr uint64_t kFnvPrime = 1099511628211U;

} // namespace

Trace& trace() {
  static Trace one;
  return one;
}

void Trace::begin(std::string run, std::string repeat, bool prints) {
  run_ = std::move(run);
  repeat_ = std::move(repeat);
  prints_ = prints;
  hash_ = kFnvStart;
  events_ = 0;
}

void Trace::note(const char* what, int64_t a, int64_t b, int64_t c) {
  const Event event{what, {a, b, c}};
  for (const char* letter = what; *letter != 0; ++letter) {
    hash_ = (hash_ ^ static_cast<uint8_t>(*letter)) * kFnvPrime;
  }
  for (const int64_t number : event.numbers) {
    hash_ = (hash_ ^ static_cast<uint64_t>(number)) * kFnvPrime;
  }
  if (prints_) {
    print(events_, event);
  }
  last_[events_++ % last_.size()] = event;
}

void Trace::print(size_t index, const Event& event) {
  std::fprintf(stderr, "%6zu %s", index, event.what);
  for (const int64_t number : event.numbers) {
    if (number != kNothing) {
      std::fprintf(stderr, " %lld", static_cast<long long>(number));
    }
  }
  std::fprintf(stderr, "\n");
}

void Trace::printEnd(const char* why) const {
  if (!prints_) {
    const size_t count = std::min<size_t>(events_, 60);
    for (size_t i = events_ - count; i < events_; ++i) {
      print(i, last_[i % last_.size()]);
    }
  }
  std::fprintf(stderr, "%s: %s\nOnce more: %s\n", run_.c_str(), why, repeat_.c_str());
  std::fflush(stderr);
}

void Trace::fail(const std::string& violated) const {
  printEnd(violated.c_str());
  std::_Exit(1);
}

} // namespace torch_rpc_mpi::simulation
