#include "python/python_error.h"

#include <optional>
#include <string>
#include <utility>

#include "base/error_text.h"
#include "python/interpreter.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

py::module_ helpers() {
  return py::module_::import("torch_rpc_mpi._remote_errors");
}

// Lone surrogates, which a text of Python may have and UTF-8 may not, are escaped.
std::string utf8(const py::object& text) {
  return text.attr("encode")("utf-8", "backslashreplace").cast<std::string>();
}

py::object shortText(const python_error& error) {
  const auto type = py::reinterpret_borrow<py::object>(error.type);
  const auto value = py::reinterpret_borrow<py::object>(error.value != nullptr ? error.value : Py_None);
  return helpers().attr("short_text")(type, value);
}

std::optional<std::string> textOf(const std::exception& error) {
  const auto* thrown = dynamic_cast<const python_error*>(&error);
  if (thrown == nullptr || thrown->type == nullptr || !interpreterRuns()) {
    return std::nullopt;
  }
  const Gil gil;
  try {
    return utf8(shortText(*thrown));
  } catch (const py::error_already_set&) {
    return std::nullopt;
  }
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) {
      std::rethrow_exception(pointer);
    }
  } catch (const PythonError& error) {
    error.restore();
  }
}

} // namespace

PythonError::PythonError(py::object remote)
    : std::runtime_error(utf8(helpers().attr("text_of")(remote))),
      remote_(shared(std::move(remote))) {}

PythonError PythonError::of(const py::error_already_set& error) {
  return PythonError(helpers().attr("of_type")(error.type(), error.what()));
}

PythonError PythonError::of(const python_error& error) {
  const auto type = py::reinterpret_borrow<py::object>(error.type);
  return PythonError(helpers().attr("of_type")(type, shortText(error)));
}

void PythonError::restore() const {
  try {
    helpers().attr("raise_again")(remote());
  } catch (py::error_already_set& error) {
    error.restore();
  }
}

void translatePythonErrors() {
  py::register_exception_translator(translate);
  setErrorTextSource(textOf);
}

} // namespace torch_rpc_mpi
