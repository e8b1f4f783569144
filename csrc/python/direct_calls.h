// rpc_sync and rpc_async without the Python that torch has in them.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/distributed/rpc/rpc_agent.h>
#include <torch/csrc/utils/pybind.h>

#include "agent/mpi_agent.h"
#include "python/by_value.h"
#include "python/pickle/plain_pickle.h"

namespace torch_rpc_mpi {

// Note [Direct calls]
// ~~~~~~~~~~~~~~~~~~~
// torch's rpc_sync and rpc_async make their calls by a Python function, _invoke_rpc, which looks the worker and the
// builtin operator up, asks for the profiler, makes a PythonUDF and pickles it: a quarter of a small call's time. Most
// calls do the same in here. To torch's function are left those under a profiler, those with another pickler
// (_use_rpc_pickler), those that are traced, and all in which something is not of the type that it usually has, with
// the errors that may come of it. So whoever changes which calls end how changes it in three places: here, in
// torch_rpc_mpi/calls.py, and for the pickle in RpcPickler.serialize_call().

// Made, used and destroyed with the GIL, which guards ended_; the rest is immutable.
class DirectCalls {
 public:
  // What Python knows of torch (torch_rpc_mpi/_torch_api.py).
  struct TorchNames {
    pybind11::dict api;              // what torch.distributed.rpc.api looks up when it runs
    pybind11::str defaultPickler;    // in there, the pickler of calls
    pybind11::dict builtins;         // the names of operators by the identity of functions
    pybind11::str asyncExecution;    // the attribute of a function whose result is a future
    pybind11::object scriptFunction; // the class
  };

  // pickler: an RpcPickler of torch_rpc_mpi._pickler that does not send everything by value; or None, if what pickles
  // the calls of Python functions is another one.
  DirectCalls(std::shared_ptr<MpiAgent> agent, pybind11::object pickler, TorchNames torchs);

  // The session is over: whoever still has torch's name for this makes no calls by it.
  void end() {
    ended_ = true;
  }

  // The arguments of rpc_sync and rpc_async.
  struct Call {
    pybind11::handle to, function, args, kwargs, timeout;
  };

  // Makes the call. If it is awaited, this thread drives progress until the answer has come. Null if the call is left
  // to torch's function.
  JitFuturePtr make(const Call& call, bool awaited) const;

 private:
  using WorkerInfo = torch::distributed::rpc::WorkerInfo;

  struct Pickled {
    std::string data;
    std::vector<at::Tensor> tensors;
    ByValue byValue;
  };

  // A call whose members have their usual types, with its timeout in seconds.
  struct Checked {
    const WorkerInfo& dst;
    pybind11::object function;
    pybind11::args args;
    pybind11::kwargs kwargs;
    float timeout = 0;
    bool awaited = false;
  };

  const WorkerInfo* worker(pybind11::handle to) const;
  std::optional<std::string> operatorOf(pybind11::handle function) const;
  pybind11::object asynchronous(pybind11::handle function) const;
  bool isScript(pybind11::handle function) const;
  JitFuturePtr callOperator(const Checked& call, const std::string& name) const;
  JitFuturePtr callScript(const Checked& call, pybind11::handle script, bool isAsync) const;
  JitFuturePtr callFunction(const Checked& call, bool isAsync) const;
  Pickled pickle(const Checked& call) const;
  template <typename Send>
  JitFuturePtr make(const Checked& call, const Send& sendIt) const;

  const std::shared_ptr<MpiAgent> agent_;
  const pybind11::object pickler_;
  const pybind11::object plainObject_; // pickler_'s
  const PlainPickler* const plain_;    // in there
  const TorchNames torchs_;
  bool ended_ = false;
};

} // namespace torch_rpc_mpi
