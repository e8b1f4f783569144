#include "python/functions_module.h"

#include <memory>
#include <sstream>

#include <torch/csrc/DynamicTypes.h>

#include "codec/sendable.h"
#include "python/builtin_operator.h"
#include "python/direct_calls.h"
#include "python/interpreter.h"
#include "python/pickle/plain_pickle.h"
#include "python/pickle/plain_pickle_format.h"
#include "python/python_functions.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

using WithoutGil = py::call_guard<NoGil>;
using PyFuture = std::shared_ptr<torch::jit::PythonFutureWrapper>;
using Tensors = std::vector<torch::Tensor>;

PyFuture wrap(c10::intrusive_ptr<JitFuture> future) {
  return std::make_shared<torch::jit::PythonFutureWrapper>(std::move(future));
}

// torch gets these through a Python call, which checks them.
py::args positional(const py::tuple& args) {
  return py::reinterpret_borrow<py::args>(args);
}

py::kwargs keywords(const py::dict& kwargs) {
  for (const auto& item : kwargs) {
    if (!PyUnicode_Check(item.first.ptr())) {
      throw py::type_error("keywords must be strings");
    }
  }
  return py::reinterpret_borrow<py::kwargs>(kwargs);
}

std::string overloadOf(const BuiltinCall& call) {
  std::ostringstream schema;
  schema << call.op->schema();
  return schema.str();
}

// For Python: a tuple of what was read, an empty one if it was not plain.
py::tuple inTuple(const py::object& loaded) {
  return loaded ? py::make_tuple(loaded) : py::tuple();
}

void bindBuiltin(py::module_& module) {
  module.def(
      "py_rpc_builtin",
      [](const WorkerInfo& dst, const std::string& name, const py::tuple& args, const py::dict& kwargs, float timeout) {
        return wrap(pyRpcBuiltin(dst, name, positional(args), keywords(kwargs), timeout));
      },
      py::arg("dst"), py::arg("op_name"), py::arg("args"), py::arg("kwargs"), py::arg("rpc_timeout_seconds"));
  module.def(
      "send_builtin",
      [](const WorkerInfo& dst, const std::string& name, const py::tuple& args, const py::dict& kwargs, float timeout) {
        return wrap(sendBuiltin(dst, name, positional(args), keywords(kwargs), timeout));
      },
      py::arg("dst"), py::arg("op_name"), py::arg("args"), py::arg("kwargs"), py::arg("rpc_timeout_seconds"));
  module.def(
      "py_remote_builtin",
      [](const WorkerInfo& dst, const std::string& name, float timeout, const py::tuple& args, const py::dict& kwargs) {
        return pyRemoteBuiltin(dst, name, timeout, positional(args), keywords(kwargs));
      },
      py::arg("dst"), py::arg("op_name"), py::arg("rpc_timeout_seconds"), py::arg("args"), py::arg("kwargs"));
  module.def(
      "match_builtin",
      [](const std::string& name, const py::tuple& args, const py::dict& kwargs, bool amongAll) {
        const auto match = amongAll ? matchBuiltinAmongAll : matchBuiltin;
        return overloadOf(match(name, positional(args), keywords(kwargs)));
      },
      py::arg("op_name"), py::arg("args"), py::arg("kwargs"), py::arg("among_all"));
}

void bindPythonUdf(py::module_& module) {
  module.def(
      "py_rpc_python_udf",
      [](const WorkerInfo& dst, std::string& pickled, Tensors& tensors, float timeout, bool isAsync,
         const py::object& byValue) {
        return wrap(pyRpcPythonUdf(dst, pickled, tensors, timeout, isAsync, ByValue(byValue, pickled, tensors)));
      },
      py::arg("dst"), py::arg("pickled_python_udf"), py::arg("tensors"), py::arg("rpc_timeout_seconds"),
      py::arg("is_async_execution"), py::arg("by_value"), WithoutGil());
  module.def(
      "send_python_udf",
      [](const WorkerInfo& dst, std::string& pickled, Tensors& tensors, float timeout, bool isAsync) {
        return wrap(sendPythonUdf(dst, pickled, tensors, timeout, isAsync));
      },
      py::arg("dst"), py::arg("pickled_python_udf"), py::arg("tensors"), py::arg("rpc_timeout_seconds"),
      py::arg("is_async_execution"), WithoutGil());
  module.def(
      "py_remote_python_udf",
      [](const WorkerInfo& dst, std::string& pickled, Tensors& tensors, float timeout, bool isAsync,
         const py::object& byValue) {
        return pyRemotePythonUdf(dst, pickled, tensors, timeout, isAsync, ByValue(byValue, pickled, tensors));
      },
      py::arg("dst"), py::arg("pickled_python_udf"), py::arg("tensors"), py::arg("rpc_timeout_seconds"),
      py::arg("is_async_execution"), py::arg("by_value"), WithoutGil());
}

void bindDirectCalls(py::module_& module) {
  // Arguments of any type: what is not usual is left to torch's function.
  using Any = const py::object&;
  py::class_<DirectCalls>(module, "DirectCalls")
      .def(
          py::init([](std::shared_ptr<MpiAgent> agent, py::object pickler, py::dict api, py::str defaultPickler,
                      py::dict builtins, py::str asyncExecution, py::object scriptFunction) {
            return DirectCalls(
                std::move(agent), std::move(pickler),
                {std::move(api), std::move(defaultPickler), std::move(builtins), std::move(asyncExecution),
                 std::move(scriptFunction)});
          }),
          py::arg("agent"), py::arg("pickler"), py::arg("api"), py::arg("default_pickler"), py::arg("builtins"),
          py::arg("async_execution"), py::arg("script_function"))
      .def(
          "sync",
          [](const DirectCalls& self, Any answer, Any to, Any function, Any args, Any kwargs, Any timeout) {
            auto future = self.make({to, function, args, kwargs, timeout}, /*awaited=*/true);
            return future == nullptr ? py::none() : answer(torch::jit::toPyObject(future->value()));
          },
          py::arg("answer"), py::arg("to"), py::arg("func"), py::arg("args"), py::arg("kwargs"), py::arg("timeout"))
      .def(
          "future",
          [](const DirectCalls& self, Any to, Any function, Any args, Any kwargs, Any timeout) {
            auto future = self.make({to, function, args, kwargs, timeout}, /*awaited=*/false);
            return future == nullptr ? nullptr : wrap(std::move(future));
          },
          py::arg("to"), py::arg("func"), py::arg("args"), py::arg("kwargs"), py::arg("timeout"))
      .def("end", &DirectCalls::end);
}

void bindTorchscript(py::module_& module) {
  module.def(
      "py_rpc_torchscript",
      [](const std::string& dst, const std::string& name, const py::tuple& args, const py::dict& kwargs, float timeout,
         bool isAsync) { return wrap(pyRpcTorchscript(dst, name, args, kwargs, timeout, isAsync)); },
      py::arg("dst_worker_name"), py::arg("qualified_name"), py::arg("args"), py::arg("kwargs"),
      py::arg("rpc_timeout_seconds"), py::arg("is_async_execution"), WithoutGil());
  module.def(
      "send_torchscript",
      [](const std::string& dst, const std::string& name, const py::tuple& args, const py::dict& kwargs, float timeout,
         bool isAsync) { return wrap(sendTorchscript(dst, name, args, kwargs, timeout, isAsync)); },
      py::arg("dst_worker_name"), py::arg("qualified_name"), py::arg("args"), py::arg("kwargs"),
      py::arg("rpc_timeout_seconds"), py::arg("is_async_execution"), WithoutGil());
  module.def(
      "py_remote_torchscript",
      [](const std::string& dst, const std::string& name, float timeout, bool isAsync, const py::tuple& args,
         const py::dict& kwargs) {
        const py::args positionals = positional(args);
        const py::kwargs named = keywords(kwargs);
        const NoGil noGil;
        return pyRemoteTorchscript(dst, name, timeout, isAsync, positionals, named);
      },
      py::arg("dst_worker_name"), py::arg("qualified_name"), py::arg("rpc_timeout_seconds"),
      py::arg("is_async_execution"), py::arg("args"), py::arg("kwargs"));
}

} // namespace

void bindFunctions(py::module_& module) {
  // torch's own modules hold the classes of the arguments and results; they must be known before the functions.
  py::module_::import("torch._C._distributed_rpc");
  bindBuiltin(module);
  bindPythonUdf(module);
  bindTorchscript(module);
  bindDirectCalls(module);
  module.def(
      "to_py_jit_future",
      [](const torch::jit::PythonFutureWrapper& messageFuture, bool hasValue) {
        return wrap(toPyJitFuture(messageFuture.fut, hasValue));
      },
      py::arg("message_future"), py::arg("has_value"), WithoutGil());
  module.attr("RESENDABLE") = py::bytes(std::string(plain_pickle::kResendable));
  py::class_<PlainPickler>(module, "PlainPickler")
      .def(py::init<std::vector<py::dict>>(), py::arg("reducers"))
      .def(
          "dump_call", [](const PlainPickler& self, const py::object& call) { return partsOf(self.dumpCall(call)); },
          py::arg("call"))
      .def(
          "dump_result",
          [](const PlainPickler& self, const py::object& value) { return partsOf(self.dumpResult(value)); },
          py::arg("value"))
      .def(
          "load_call",
          [](const PlainPickler& self, std::string data, Tensors tensors) {
            return inTuple(self.loadCall({std::move(data), std::move(tensors)}));
          },
          py::arg("data"), py::arg("tensors"))
      .def_static(
          "load_result",
          [](std::string data, Tensors tensors) {
            return inTuple(loadPlainResult({std::move(data), std::move(tensors)}));
          },
          py::arg("data"), py::arg("tensors"));
  module.def(
      "why_not_sent",
      [](const at::Tensor& tensor, bool inCall) {
        return whyNotSent(tensor, inCall ? Place::kRequest : Place::kResult);
      },
      py::arg("tensor"), py::arg("in_call"));
  module.def(
      "bytes_of_storage", [](const py::object& storage) { return bytesOf(torch::createStorage(storage.ptr())); },
      py::arg("storage"));
  module.def(
      "is_plain_result",
      [](std::string pickled, Tensors tensors) {
        return plainResult({std::move(pickled), std::move(tensors)}).has_value();
      },
      py::arg("pickled"), py::arg("tensors"), WithoutGil());
}

} // namespace torch_rpc_mpi
