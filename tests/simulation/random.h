// Choices that a seed makes, the same on every machine: the distributions of the standard library are not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

namespace torch_rpc_mpi::simulation {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  size_t below(size_t limit) { // 0 for 0
    return limit == 0 ? 0 : static_cast<size_t>(engine_() % limit);
  }
  size_t between(size_t low, size_t high) { // both included
    return low + below(high - low + 1);
  }
  bool chance(unsigned percent) {
    return below(100) < percent;
  }

 private:
  std::mt19937_64 engine_;
};

} // namespace torch_rpc_mpi::simulation
