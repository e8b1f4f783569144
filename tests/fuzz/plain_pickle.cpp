// Any bytes as a plain pickle: what is read of them is what Python's unpickler reads.
#include <cstring>

#include <ATen/Functions.h>

#include "check.h"
#include "python/pickle/plain_pickle.h"

namespace py = pybind11;
using namespace torch_rpc_mpi;

namespace {

// With the environment's packages, whose Python this is.
void startPython() {
  PyConfig config;
  PyConfig_InitPythonConfig(&config);
  config.install_signal_handlers = 0; // they are libFuzzer's
  PyConfig_SetBytesString(&config, &config.program_name, PYTHON_EXECUTABLE);
  const PyStatus status = Py_InitializeFromConfig(&config);
  PyConfig_Clear(&config);
  if (PyStatus_Exception(status)) {
    Py_ExitStatusException(status);
  }
}

struct Reading {
  Reading() {
    startPython();
    py::module_::import("torch");
    repr = py::module_::import("builtins").attr("repr");
    unpickle = py::module_::import("pickle").attr("loads");
    pickler = new PlainPickler({});
    for (int64_t i = 0; i < 3; ++i) {
      tensors.push_back(at::full({1}, i));
    }
  }
  py::object repr, unpickle;
  PlainPickler* pickler = nullptr; // like the interpreter, for ever
  std::vector<at::Tensor> tensors;
};

// An error of the interpreter's own limits says nothing of the pickle.
bool isRecursion(const py::error_already_set& error) {
  return error.matches(PyExc_RecursionError);
}

void compare(const Reading& reading, const py::object& value, const std::string& pickle) {
  try {
    const auto expected = reading.repr(reading.unpickle(py::bytes(pickle))).cast<std::string>();
    check::equal(reading.repr(value).cast<std::string>(), expected, "what is read", __FILE__, __LINE__);
  } catch (const py::error_already_set& error) {
    if (!isRecursion(error)) {
      throw;
    }
  }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto* const reading = new Reading();
  if (size < 1) {
    return 0;
  }
  const bool isCall = (data[0] & 1) != 0;
  const size_t tensors = (data[0] >> 1) & 3U;
  const std::string pickle(reinterpret_cast<const char*>(data) + 1, size - 1);
  // Without spare room, so that its end is the end of memory.
  torch::distributed::rpc::SerializedPyObj pickled(
      std::string(pickle.data(), pickle.size()),
      std::vector<at::Tensor>(reading->tensors.begin(), reading->tensors.begin() + static_cast<ptrdiff_t>(tensors)));
  pickled.payload_.shrink_to_fit();
  (void)plainResult(pickled);
  const py::object value = isCall ? reading->pickler->loadCall(pickled) : loadPlainResult(pickled);
  check::that(PyErr_Occurred() == nullptr, "no error of Python is left", __FILE__, __LINE__);
  if (value && tensors == 0) {
    compare(*reading, value, pickle);
  }
  return 0;
}
