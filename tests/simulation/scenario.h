// Which faults strike, and how often each.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace torch_rpc_mpi::simulation {

enum class Fault : size_t {
  kSendError,
  kReceiveError,
  kFlippedField,
  kShortFrame,
  kShortChunk,
  kDeath,
  kPause,       // a process is stopped for a while
  kStop,        // … and takes nothing until the others have all that they need of one another
  kBroken,      // the transport's poll throws
  kNoMemory,    // in a turn or a task
  kWrongWorker, // a response of another than was called
  kBadDrain,    // a drain frame out of turn
  kBadCredit,   // an acknowledgement of what was never sent
  kLeave,       // a worker leaves without the others
  kShortJoin,   // a join that times out, and another
  kSignal,      // in a join
  kCount
};

struct Scenario {
  std::string name;
  unsigned faults; // at most, in one run
  std::array<unsigned, static_cast<size_t>(Fault::kCount)> weights;
};

const std::vector<Scenario>& scenarios();
// By its name; null if there is none.
const Scenario* findScenario(const std::string& name);

} // namespace torch_rpc_mpi::simulation
