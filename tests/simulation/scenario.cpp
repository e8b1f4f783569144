#include "scenario.h"

#include <algorithm>

namespace torch_rpc_mpi::simulation {

const std::vector<Scenario>& scenarios() {
  static const std::vector<Scenario> all{
      //            send recv flip shortF shortC death pause stop broken memory wrong drain credit leave join signal
      {"calm", 0, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
      {"frames", 4, {1, 3, 8, 2, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
      {"peers", 3, {4, 1, 0, 0, 0, 6, 4, 0, 1, 0, 0, 0, 0, 4, 1, 1}},
      {"stops", 4, {0, 0, 0, 0, 0, 2, 1, 8, 0, 0, 0, 0, 0, 1, 0, 0}},
      {"lies", 4, {0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 6, 8, 4, 0, 5, 0}},
      {"memory", 3, {0, 0, 0, 0, 0, 1, 0, 0, 0, 10, 0, 0, 0, 1, 0, 0}},
      {"joins", 6, {0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 8, 6}},
      {"all", 5, {1, 1, 2, 1, 1, 2, 2, 1, 1, 2, 1, 1, 1, 1, 2, 2}}};
  return all;
}

const Scenario* findScenario(const std::string& name) {
  const auto found = std::ranges::find(scenarios(), name, &Scenario::name);
  return found == scenarios().end() ? nullptr : &*found;
}

} // namespace torch_rpc_mpi::simulation
