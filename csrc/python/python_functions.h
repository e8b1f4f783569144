// The functions that torch keeps hidden in torch/csrc/distributed/rpc/python_functions.h: the same names, arguments and
// behaviour, for whatever RpcAgent is current.
#pragma once

#include <string>
#include <vector>

#include <torch/csrc/distributed/rpc/py_rref.h>
#include <torch/csrc/distributed/rpc/rpc_agent.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include "agent/call_table.h"
#include "python/builtin_operator.h"
#include "python/by_value.h"

namespace torch_rpc_mpi {

using torch::distributed::rpc::JitFuture;
using torch::distributed::rpc::PyRRef;
using torch::distributed::rpc::WorkerInfo;

// The future of a response as a future of the Python object in it, made on the thread that completes the former.
// Without hasValue it has no value, and the response is not looked into; an error is passed on either way.
JitFuturePtr toPyJitFuture(const JitFuturePtr& messageJitFuture, bool hasValue = true);

// As in torch, the functions of builtin operators are called with the GIL and release it to send, and all others are
// called without it. rpcTimeoutSeconds is in seconds: 0 for no timeout, kUnsetRpcTimeout for the agent's.

JitFuturePtr pyRpcBuiltin(
    const WorkerInfo& dst,
    const std::string& opName,
    const pybind11::args& args,
    const pybind11::kwargs& kwargs,
    float rpcTimeoutSeconds);

// The same with the operator found, without the GIL.
JitFuturePtr pyRpcBuiltin(const WorkerInfo& dst, BuiltinCall call, float rpcTimeoutSeconds);

// Takes pickledPythonUDF and the contents of tensors. byValue is for a call that names something of __main__: when the
// callee says that its __main__ lacks a name, before anything has run, the call is pickled by value and sent again,
// once.
JitFuturePtr pyRpcPythonUdf(
    const WorkerInfo& dst,
    std::string& pickledPythonUDF,
    std::vector<torch::Tensor>& tensors,
    float rpcTimeoutSeconds,
    bool isAsyncExecution,
    ByValue byValue = {});

JitFuturePtr pyRpcTorchscript(
    const std::string& dstWorkerName,
    const std::string& qualifiedNameStr,
    const pybind11::tuple& argsTuple,
    const pybind11::dict& kwargsDict,
    float rpcTimeoutSeconds,
    bool isAsyncExecution);

PyRRef pyRemoteBuiltin(
    const WorkerInfo& dst,
    const std::string& opName,
    float rpcTimeoutSeconds,
    const pybind11::args& args,
    const pybind11::kwargs& kwargs);

// The arguments as for pyRpcPythonUdf.
PyRRef pyRemotePythonUdf(
    const WorkerInfo& dst,
    std::string& pickledPythonUDF,
    std::vector<torch::Tensor>& tensors,
    float rpcTimeoutSeconds,
    bool isAsyncExecution,
    ByValue byValue = {});

PyRRef pyRemoteTorchscript(
    const std::string& dstWorkerName,
    const std::string& qualifiedNameStr,
    float rpcTimeoutSeconds,
    bool isAsyncExecution,
    const pybind11::args& args,
    const pybind11::kwargs& kwargs);

// The first halves of the pyRpc* functions: they return the future of the response, for toPyJitFuture().

JitFuturePtr sendBuiltin(
    const WorkerInfo& dst,
    const std::string& opName,
    const pybind11::args& args,
    const pybind11::kwargs& kwargs,
    float rpcTimeoutSeconds);

JitFuturePtr sendPythonUdf(
    const WorkerInfo& dst,
    std::string& pickledPythonUDF,
    std::vector<torch::Tensor>& tensors,
    float rpcTimeoutSeconds,
    bool isAsyncExecution);

JitFuturePtr sendTorchscript(
    const std::string& dstWorkerName,
    const std::string& qualifiedNameStr,
    const pybind11::tuple& argsTuple,
    const pybind11::dict& kwargsDict,
    float rpcTimeoutSeconds,
    bool isAsyncExecution);

} // namespace torch_rpc_mpi
