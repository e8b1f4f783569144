#include <algorithm>
#include <cstring>
#include <string_view>
#include <unordered_set>

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/distributed/rpc/py_rref.h>

#include "codec/sendable.h"
#include "python/pickle/plain_pickle.h"
#include "python/pickle/plain_pickle_format.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

using namespace plain_pickle;

namespace {

constexpr int kDeepest = 100;
// Texts up to this length are written wherever they occur, longer ones once only.
constexpr size_t kWrittenAgain = 64;
constexpr size_t kLongest = 1 << 16; // of a text, and about of the whole

// One message.
class PickleWriter {
 public:
  PickleWriter(const std::vector<py::dict>& reducers, bool isCall) : reducers_(reducers), isCall_(isCall) {}

  std::optional<PlainPickle> writeResult(PyObject* value) {
    pickle_.data = kStart;
    return any(value, 0) ? finished() : std::nullopt;
  }

  // A named tuple.
  std::optional<PlainPickle> writeCall(PyObject* function, PyObject* args, PyObject* kwargs) {
    pickle_.data = kStart;
    append(kCallType);
    if (!any(function, 0) || !any(args, 0) || !any(kwargs, 0)) {
      return std::nullopt;
    }
    append(kTuples[2]);
    append(kNewObject);
    return finished();
  }

 private:
  std::optional<PlainPickle> finished() {
    append(kStop);
    return std::move(pickle_);
  }

  // All return whether it is plain; no Python exception is left then or otherwise.

  bool any(PyObject* value, int depth) {
    if (pickle_.data.size() > kLongest) {
      return false;
    }
    PyTypeObject* type = Py_TYPE(value);
    if (value == Py_None) {
      return append(kNone);
    }
    if (type == &PyBool_Type) {
      return append(value == Py_True ? kTrue : kFalse);
    }
    if (type == &PyLong_Type) {
      return integer(value);
    }
    if (type == &PyFloat_Type) {
      return real(PyFloat_AS_DOUBLE(value));
    }
    if (type == &PyUnicode_Type) {
      return text(value);
    }
    if (type == &PyBytes_Type) {
      return once(value, PyBytes_GET_SIZE(value)) &&
          sized(kShortBytes, kBytes, {PyBytes_AS_STRING(value), static_cast<size_t>(PyBytes_GET_SIZE(value))});
    }
    if (type == &PyTuple_Type) {
      return tuple(value, depth + 1);
    }
    if (type == &PyList_Type) {
      return list(value, depth + 1);
    }
    if (type == &PyDict_Type) {
      return dict(value, depth + 1);
    }
    if (type == reinterpret_cast<PyTypeObject*>(THPVariableClass)) {
      const at::Tensor& tensor = THPVariable_Unpack(value);
      if (!once(value) || !mayReceive(type, kReceiveTensor, tensorReceiver_) ||
          whyNotSent(tensor, isCall_ ? Place::kRequest : Place::kResult)) {
        return false;
      }
      pickle_.tensors.push_back(tensor);
      return outOfBand(pickle_.tensors.size() - 1);
    }
    return isCall_ && (global(value) || rref(value));
  }

  bool integer(PyObject* value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) {
      return false;
    }
    if (number >= 0 && number < 1 << 16) {
      return smallInteger(static_cast<uint32_t>(number));
    }
    const bool fits = number == static_cast<int32_t>(number);
    return (fits ? append(kInt4) : append(kInt8)) && littleEndian(static_cast<uint64_t>(number), fits ? 4 : 8);
  }

  bool smallInteger(uint32_t number) {
    const bool isByte = number < 1 << 8;
    return append(isByte ? kInt1 : kInt2) && littleEndian(number, isByte ? 1 : 2);
  }

  bool real(double number) {
    uint64_t bits = 0;
    std::memcpy(&bits, &number, sizeof(bits));
    append(kFloat);
    for (int shift = 56; shift >= 0; shift -= 8) {
      pickle_.data.push_back(static_cast<char>(bits >> shift));
    }
    return true;
  }

  bool text(PyObject* value) {
    Py_ssize_t size = 0;
    const char* utf8 = PyUnicode_AsUTF8AndSize(value, &size);
    if (utf8 == nullptr) { // surrogates
      PyErr_Clear();
      return false;
    }
    return once(value, size) && sized(kShortText, kText, {utf8, static_cast<size_t>(size)});
  }

  bool sized(char shortOp, char longOp, std::string_view bytes) {
    if (bytes.size() > kLongest) {
      return false;
    }
    const bool isShort = bytes.size() < 1 << 8;
    pickle_.data.push_back(isShort ? shortOp : longOp);
    return littleEndian(bytes.size(), isShort ? 1 : 4) && append(bytes);
  }

  bool tuple(PyObject* value, int depth) {
    const Py_ssize_t size = PyTuple_GET_SIZE(value);
    if (size == 0) {
      return append(kEmptyTuple);
    }
    if (depth > kDeepest || !once(value)) {
      return false;
    }
    if (size > 3) {
      append(kMark);
    }
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!any(PyTuple_GET_ITEM(value, i), depth)) {
        return false;
      }
    }
    return append(size > 3 ? kTuple : kTuples[size - 1]);
  }

  bool list(PyObject* value, int depth) {
    if (depth > kDeepest || !once(value)) {
      return false;
    }
    append(kEmptyList);
    append(kMark);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i) {
      if (!any(PyList_GET_ITEM(value, i), depth)) {
        return false;
      }
    }
    return append(kAppends);
  }

  bool dict(PyObject* value, int depth) {
    if (depth > kDeepest || !once(value)) {
      return false;
    }
    append(kEmptyDict);
    append(kMark);
    Py_ssize_t position = 0;
    PyObject* key = nullptr;
    PyObject* item = nullptr;
    while (PyDict_Next(value, &position, &key, &item) != 0) {
      if (!any(key, depth) || !any(item, depth)) {
        return false;
      }
    }
    return append(kSetItems);
  }

  // A function or class that its module has under its name, where nothing but looking into dicts tells so.
  bool global(PyObject* value) {
    py::object module;
    py::object name;
    if (Py_TYPE(value) == &PyFunction_Type) {
      module = py::reinterpret_borrow<py::object>(PyFunction_GET_MODULE(value));
      name = py::reinterpret_borrow<py::object>(reinterpret_cast<PyFunctionObject*>(value)->func_qualname);
    } else if (Py_TYPE(value) == &PyType_Type) {
      module = py::reinterpret_steal<py::object>(PyObject_GetAttrString(value, "__module__"));
      name = py::reinterpret_steal<py::object>(PyObject_GetAttrString(value, "__qualname__"));
      PyErr_Clear();
    }
    if (!module || !name || !PyUnicode_CheckExact(module.ptr()) || !PyUnicode_CheckExact(name.ptr())) {
      return false;
    }
    PyObject* found = PyDict_GetItem(PyImport_GetModuleDict(), module.ptr());
    if (found == nullptr || !PyModule_CheckExact(found) ||
        PyDict_GetItem(PyModule_GetDict(found), name.ptr()) != value) {
      return false;
    }
    // A dot in a name means something inside something else, even where the module has it under just that name.
    const bool hasDot = PyUnicode_FindChar(name.ptr(), '.', 0, PyUnicode_GET_LENGTH(name.ptr()), 1) >= 0;
    return !hasDot && text(module.ptr()) && text(name.ptr()) && append(kGlobal);
  }

  bool rref(PyObject* value) {
    PyTypeObject* type = Py_TYPE(value);
    if (type != reinterpret_cast<PyTypeObject*>(py::type::of<torch::distributed::rpc::PyRRef>().ptr()) ||
        !once(value) || !mayReceive(type, kReceiveRRef, rrefReceiver_)) {
      return false;
    }
    pickle_.rrefs.push_back(py::reinterpret_borrow<py::object>(value));
    return outOfBand(pickle_.rrefs.size() - 1);
  }

  // Pushes what receives things of this type.
  bool mayReceive(PyTypeObject* type, std::string_view receiver, int& memoized) {
    if (memoized >= 0) {
      return append(kMemoGet) && littleEndian(memoized, 1);
    }
    for (const py::dict& each : reducers_) {
      if (PyDict_GetItem(each.ptr(), reinterpret_cast<PyObject*>(type)) != nullptr) {
        return false;
      }
    }
    memoized = memos_++;
    return append(receiver);
  }

  bool outOfBand(size_t number) {
    return number < 1 << 16 && smallInteger(static_cast<uint32_t>(number)) && append(kTuples[0]) && append(kReduce);
  }

  bool once(PyObject* value, size_t size = kLongest) {
    return size <= kWrittenAgain || seen_.insert(value).second;
  }

  bool littleEndian(uint64_t number, int size) {
    for (int i = 0; i < size; ++i) {
      pickle_.data.push_back(static_cast<char>(number >> (8 * i)));
    }
    return true;
  }

  bool append(char opcode) {
    pickle_.data.push_back(opcode);
    return true;
  }

  bool append(std::string_view bytes) {
    pickle_.data.append(bytes);
    return true;
  }

  const std::vector<py::dict>& reducers_;
  const bool isCall_;
  PlainPickle pickle_;
  std::unordered_set<const PyObject*> seen_;
  int memos_ = 0;
  int tensorReceiver_ = -1; // where the unpickler's memo has it
  int rrefReceiver_ = -1;
};

} // namespace

py::object partsOf(std::optional<PlainPickle> pickle) {
  if (!pickle) {
    return py::none();
  }
  return py::make_tuple(py::bytes(pickle->data), std::move(pickle->tensors), std::move(pickle->rrefs));
}

PlainPickler::PlainPickler(std::vector<py::dict> reducers)
    : reducers_(std::move(reducers)),
      callType_(py::module_::import("torch.distributed.rpc.internal").attr("PythonUDF")) {}

std::optional<PlainPickle> PlainPickler::dumpCall(py::handle call) const {
  PyObject* const udf = call.ptr();
  if (Py_TYPE(udf) != reinterpret_cast<PyTypeObject*>(callType_.ptr()) || PyTuple_GET_SIZE(udf) != 3) {
    return std::nullopt;
  }
  return dumpCall(PyTuple_GET_ITEM(udf, 0), PyTuple_GET_ITEM(udf, 1), PyTuple_GET_ITEM(udf, 2));
}

std::optional<PlainPickle> PlainPickler::dumpCall(py::handle function, py::handle args, py::handle kwargs) const {
  return PickleWriter(reducers_, true).writeCall(function.ptr(), args.ptr(), kwargs.ptr());
}

std::optional<PlainPickle> PlainPickler::dumpResult(py::handle value) const {
  return PickleWriter(reducers_, false).writeResult(value.ptr());
}

} // namespace torch_rpc_mpi
