// The pickles of what calls and results mostly consist of, made and read without Python's pickler.
//
// Note [Plain pickles]
// ~~~~~~~~~~~~~~~~~~~~
// Python's pickler takes several microseconds for the smallest call: most of a call's time at the caller. Plain are
// None, bool, int, float, str, bytes, tuple, list and dict, torch.Tensor and PyRRef, and in a call also functions and
// classes at the top level of their modules; these types themselves, none derived from them. What is not, what occurs
// twice and must stay one object at the receiver (short texts need not), and what is so long that microseconds do not
// matter, is left to Python's pickler, the whole message. What is written here, any unpickler reads. For what is read
// here, no hooks of Python's unpickler are called: no audit events, no find_class().
//
// None and a tensor alone, the commonest results, have pickles that are always the same. Known by heart, these can be
// read without the GIL, for which the threads of a busy caller would queue.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/distributed/rpc/types.h>
#include <torch/csrc/utils/pybind.h>

namespace torch_rpc_mpi {

struct PlainPickle {
  std::string data;
  std::vector<at::Tensor> tensors;     // out of band, by number
  std::vector<pybind11::object> rrefs; // likewise
};

// For Python: its bytes, tensors and RRefs; None for nothing.
pybind11::object partsOf(std::optional<PlainPickle> pickle);

// Immutable, but for what Python puts into the dicts that it knows. Made, used and destroyed with the GIL. Python's
// garbage collector does not see through it: a reducer that refers to the object that has this one is kept for ever.
class PlainPickler {
 public:
  // `reducers`: dicts by type; a type that is a key of one is not plain.
  explicit PlainPickler(std::vector<pybind11::dict> reducers);

  // Nothing if something in `value` is not plain. A call is a torch.distributed.rpc.internal.PythonUDF.
  std::optional<PlainPickle> dumpCall(pybind11::handle call) const;
  // The call that has these members.
  std::optional<PlainPickle> dumpCall(pybind11::handle function, pybind11::handle args, pybind11::handle kwargs) const;
  // The same without functions, classes and RRefs.
  std::optional<PlainPickle> dumpResult(pybind11::handle value) const;

  // What dumpCall() pickled, without RRefs, read in another process; or null: Python's unpickler must see, which also
  // knows what to do where names are missing.
  pybind11::object loadCall(const torch::distributed::rpc::SerializedPyObj& pickled) const;

  // PythonUDF.
  const pybind11::object& callType() const {
    return callType_;
  }

 private:
  std::vector<pybind11::dict> reducers_;
  pybind11::object callType_;
};

// What dumpResult() pickled, or null. With the GIL.
pybind11::object loadPlainResult(const torch::distributed::rpc::SerializedPyObj& pickled);

// The value, if it is None or a tensor as dumpResult() pickles it. Needs no GIL.
std::optional<c10::IValue> plainResult(const torch::distributed::rpc::SerializedPyObj& result);

} // namespace torch_rpc_mpi
