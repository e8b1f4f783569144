// A Python function that a peer calls, as it is on its way to be run.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include <torch/csrc/distributed/rpc/rpc_command_base.h>
#include <torch/csrc/distributed/rpc/types.h>
#include <torch/csrc/utils/pybind.h>

#include "agent/mpi_agent.h"
#include "python/interpreter.h"
#include "python/pickle/plain_pickle.h"

namespace torch_rpc_mpi {

// The GIL, and if that is profiled, how long it took to get it.
class TimedGil {
 public:
  explicit TimedGil(MpiAgent* agent);

 private:
  std::optional<Gil> gil_;
};

// A Python function that was unpickled, and for rpc.remote where its result belongs.
class PythonFunction final : public torch::distributed::rpc::RpcCommandBase {
 public:
  PythonFunction(
      MpiAgent* agent,
      const PlainPickler* plain,
      const torch::distributed::rpc::SerializedPyObj& pickled,
      bool async);
  ~PythonFunction() override;
  PythonFunction(const PythonFunction&) = delete;
  PythonFunction& operator=(const PythonFunction&) = delete;

  c10::intrusive_ptr<torch::distributed::rpc::Message> toMessageImpl() && override;

  pybind11::object function;
  std::string missing; // instead of the function: see torch_rpc_mpi._pickler.missing_in_main
  const bool isAsync;
  std::optional<std::pair<torch::distributed::rpc::RRefId, torch::distributed::rpc::ForkId>> result;
};

// Says of the request that this thread runs what `call`, a PythonUDF of torch's, calls. With the GIL.
void nameCalledFunction(const pybind11::object& call) noexcept;

} // namespace torch_rpc_mpi
