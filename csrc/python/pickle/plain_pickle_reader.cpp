#include <algorithm>
#include <cstring>
#include <type_traits>

#include <torch/csrc/autograd/python_variable.h>

#include "python/pickle/plain_pickle.h"
#include "python/pickle/plain_pickle_format.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

using namespace plain_pickle;

namespace {

using torch::distributed::rpc::SerializedPyObj;

// One message. Whatever its bytes are, nothing beyond them is read, and no code of a user runs.
class PickleReader {
 public:
  // callType: null where no call is expected.
  PickleReader(const SerializedPyObj& pickled, PyObject* callType)
      : left_(pickled.payload_),
        tensors_(pickled.tensors_),
        callType_(callType) {}

  // Null if it is not a plain pickle, or names what is not there.
  py::object read() {
    bool ended = !skip(kStart);
    while (!ended && !left_.empty()) {
      const char opcode = left_.front();
      if (opcode == kStop) {
        const std::string_view rest = left_.substr(1);
        const bool complete = marks_.empty() && stack_.size() == 1 && (rest.empty() || rest == kResendable);
        return complete ? stack_.front() : py::object();
      }
      ended = !takeKnownName(opcode) && !apply(opcode);
    }
    PyErr_Clear();
    return {};
  }

 private:
  // Like all that follow: whether it could be read; otherwise a Python exception may be set.
  bool apply(char opcode) {
    left_.remove_prefix(1);
    switch (opcode) {
      case kNone:
        return push(Py_NewRef(Py_None));
      case kTrue:
        return push(Py_NewRef(Py_True));
      case kFalse:
        return push(Py_NewRef(Py_False));
      case kInt1:
        return integer<uint8_t>();
      case kInt2:
        return integer<uint16_t>();
      case kInt4:
        return integer<int32_t>();
      case kInt8.front():
        return skip(kInt8.substr(1)) && integer<int64_t>();
      case kFloat:
        return real();
      case kShortText:
        return sized<uint8_t>(PyUnicode_FromStringAndSize);
      case kText:
        return sized<uint32_t>(PyUnicode_FromStringAndSize);
      case kShortBytes:
        return sized<uint8_t>(PyBytes_FromStringAndSize);
      case kBytes:
        return sized<uint32_t>(PyBytes_FromStringAndSize);
      case kEmptyTuple:
        return push(PyTuple_New(0));
      case kTuples[0]:
      case kTuples[1]:
      case kTuples[2]:
        return tuple(kTuples.find(opcode) + 1);
      case kEmptyList:
        return push(PyList_New(0));
      case kEmptyDict:
        return push(PyDict_New());
      case kMark:
        marks_.push_back(stack_.size());
        return true;
      case kTuple:
      case kAppends:
      case kSetItems:
        return fill(opcode);
      case kGlobal:
        return global();
      case kReduce:
        return tensor();
      case kNewObject:
        return call();
      default:
        return false;
    }
  }

  // Names that are known here need no looking up. What receives tensors is on the stack as a null object.
  bool takeKnownName(char opcode) {
    if (opcode == kShortText && callType_ != nullptr && skip(kCallType)) {
      stack_.push_back(py::reinterpret_borrow<py::object>(callType_));
      return true;
    }
    if (opcode == kShortText && !memoized_ && skip(kReceiveTensor)) {
      memoized_ = true;
    } else if (opcode != kMemoGet || !memoized_ || !skip(kMemoOfTensors)) {
      return false;
    }
    stack_.emplace_back();
    return true;
  }

  bool push(PyObject* made) {
    stack_.push_back(py::reinterpret_steal<py::object>(made));
    return made != nullptr;
  }

  template <class Number>
  bool take(Number& number) {
    std::make_unsigned_t<Number> bits = 0;
    if (left_.size() < sizeof(bits)) {
      return false;
    }
    for (size_t i = 0; i < sizeof(bits); ++i) { // little-endian
      bits |= static_cast<std::make_unsigned_t<Number>>(static_cast<unsigned char>(left_[i])) << (8 * i);
    }
    number = static_cast<Number>(bits);
    left_.remove_prefix(sizeof(bits));
    return true;
  }

  template <class Number>
  bool integer() {
    Number number = 0;
    return take(number) && push(PyLong_FromLongLong(number));
  }

  bool real() {
    uint64_t bits = 0;
    if (!take(bits)) {
      return false;
    }
    bits = __builtin_bswap64(bits); // big-endian
    double number = 0;
    std::memcpy(&number, &bits, sizeof(number));
    return push(PyFloat_FromDouble(number));
  }

  template <class Size>
  bool sized(PyObject* (*make)(const char*, Py_ssize_t)) {
    Size size = 0;
    if (!take(size) || left_.size() < size) {
      return false;
    }
    const char* bytes = left_.data();
    left_.remove_prefix(size);
    return push(make(bytes, static_cast<Py_ssize_t>(size)));
  }

  size_t aboveMark() const {
    return stack_.size() - (marks_.empty() ? 0 : marks_.back());
  }

  // Whether there are so many values above the last mark.
  bool has(size_t count) const {
    return aboveMark() >= count &&
        std::all_of(stack_.end() - static_cast<ptrdiff_t>(count), stack_.end(), [](const auto& each) {
             return static_cast<bool>(each);
           });
  }

  bool tuple(size_t size) {
    if (!has(size)) {
      return false;
    }
    PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(size));
    if (made == nullptr) {
      return false;
    }
    const size_t first = stack_.size() - size;
    for (size_t i = 0; i < size; ++i) {
      PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), stack_[first + i].release().ptr());
    }
    stack_.resize(first);
    return push(made);
  }

  // Puts what is above the last mark into a new tuple, or into the list or dict below the mark.
  bool fill(char opcode) {
    if (marks_.empty() || !has(stack_.size() - marks_.back())) {
      return false;
    }
    const size_t first = marks_.back();
    marks_.pop_back();
    if (opcode == kTuple) {
      return tuple(stack_.size() - first);
    }
    if (aboveMark() <= stack_.size() - first || !stack_[first - 1]) {
      return false;
    }
    PyObject* container = stack_[first - 1].ptr();
    const bool filled = opcode == kAppends ? append(container, first) : setItems(container, first);
    stack_.resize(first);
    return filled;
  }

  bool append(PyObject* list, size_t first) const {
    return PyList_CheckExact(list) &&
        std::all_of(stack_.begin() + static_cast<ptrdiff_t>(first), stack_.end(), [&](const auto& item) {
             return PyList_Append(list, item.ptr()) == 0;
           });
  }

  bool setItems(PyObject* dict, size_t first) const {
    if (!PyDict_CheckExact(dict) || (stack_.size() - first) % 2 != 0) {
      return false;
    }
    for (size_t i = first; i < stack_.size(); i += 2) {
      if (PyDict_SetItem(dict, stack_[i].ptr(), stack_[i + 1].ptr()) != 0) {
        return false;
      }
    }
    return true;
  }

  // A module's function or class; not what would have to be imported or what a user's code would find.
  bool global() {
    if (!has(2)) {
      return false;
    }
    const py::object name = std::move(stack_.back());
    stack_.pop_back();
    const py::object module = std::move(stack_.back());
    stack_.pop_back();
    if (!PyUnicode_CheckExact(name.ptr()) || !PyUnicode_CheckExact(module.ptr())) {
      return false;
    }
    PyObject* found = PyDict_GetItem(PyImport_GetModuleDict(), module.ptr());
    if (found == nullptr || !PyModule_CheckExact(found)) {
      return false;
    }
    PyObject* members = PyModule_GetDict(found);
    found = PyDict_GetItem(members, name.ptr());
    return found != nullptr && !isBeingImported(members) && push(Py_NewRef(found));
  }

  // By another thread, for which Python's unpickler waits: what is there may not work yet.
  static bool isBeingImported(PyObject* members) {
    PyObject* spec = PyDict_GetItemString(members, "__spec__");
    if (spec == nullptr || spec == Py_None) {
      return false;
    }
    const auto initializing = py::reinterpret_steal<py::object>(PyObject_GetAttrString(spec, "_initializing"));
    PyErr_Clear();
    return initializing && initializing.ptr() != Py_False;
  }

  bool tensor() {
    if (aboveMark() < 2 || !has(1) || stack_[stack_.size() - 2]) {
      return false;
    }
    const py::object arguments = std::move(stack_.back());
    stack_.resize(stack_.size() - 2);
    if (!PyTuple_CheckExact(arguments.ptr()) || PyTuple_GET_SIZE(arguments.ptr()) != 1 ||
        !PyLong_CheckExact(PyTuple_GET_ITEM(arguments.ptr(), 0))) {
      return false;
    }
    const size_t number = PyLong_AsSize_t(PyTuple_GET_ITEM(arguments.ptr(), 0)); // the largest, where it is negative
    return number < tensors_.size() && push(THPVariable_Wrap(tensors_[number]));
  }

  bool call() {
    if (callType_ == nullptr || !has(2) || stack_[stack_.size() - 2].ptr() != callType_ ||
        !PyTuple_CheckExact(stack_.back().ptr()) || PyTuple_GET_SIZE(stack_.back().ptr()) != 3) {
      return false;
    }
    // As tuple.__new__(PythonUDF, parts), which is what its own __new__ does.
    const py::object arguments = py::make_tuple(std::move(stack_.back()));
    stack_.resize(stack_.size() - 2);
    return push(PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(callType_), arguments.ptr(), nullptr));
  }

  bool skip(std::string_view text) {
    if (left_.substr(0, text.size()) != text) {
      return false;
    }
    left_.remove_prefix(text.size());
    return true;
  }

  std::string_view left_;
  const std::vector<at::Tensor>& tensors_;
  PyObject* const callType_;
  std::vector<py::object> stack_;
  std::vector<size_t> marks_; // sizes of the stack
  bool memoized_ = false;     // what receives tensors
};

} // namespace

py::object PlainPickler::loadCall(const SerializedPyObj& pickled) const {
  return PickleReader(pickled, callType_.ptr()).read();
}

py::object loadPlainResult(const SerializedPyObj& pickled) {
  return PickleReader(pickled, nullptr).read();
}

std::optional<c10::IValue> plainResult(const SerializedPyObj& pickled) {
  std::string_view pickle = pickled.payload_;
  if (pickle == "\x80\x04N." || pickle == "\x80\x05N.") { // the latter from Python's own pickler, from 3.14 on
    return c10::IValue();
  }
  for (const std::string_view part : {kStart, kReceiveTensor, kFirstTensor}) {
    if (pickle.substr(0, part.size()) != part) {
      return std::nullopt;
    }
    pickle.remove_prefix(part.size());
  }
  if (pickle != std::string_view(&kStop, 1) || pickled.tensors_.size() != 1) {
    return std::nullopt;
  }
  return pickled.tensors_.front();
}

} // namespace torch_rpc_mpi
