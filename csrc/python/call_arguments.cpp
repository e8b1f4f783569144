#include "python/call_arguments.h"
#include "python/interpreter.h"

#include <stdexcept>
#include <string>

#include <ATen/core/class_type.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "codec/sendable.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

// Calls visit(part, step) for what a value directly consists of, until it returns true; step() is how a path goes on.
template <typename Visit>
bool anyPart(const c10::IValue& value, const Visit& visit) {
  const auto anyItem = [&](const auto& items) {
    for (size_t i = 0; i < items.size(); ++i) {
      if (visit(items[i], [&] { return c10::str('[', i, ']'); })) {
        return true;
      }
    }
    return false;
  };
  if (value.isTensorList()) {
    return anyItem(value.toTensorVector());
  }
  if (value.isTuple()) {
    return anyItem(value.toTupleRef().elements());
  }
  // Lists of numbers have no such parts, and may be long.
  if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
    return anyItem(value.toListRef());
  }
  if (value.isGenericDict()) {
    for (const auto& entry : value.toGenericDict()) {
      const auto step = [&] {
        const char* quote = entry.key().isString() ? "'" : "";
        return c10::str('[', quote, entry.key(), quote, ']');
      };
      if (visit(entry.value(), step)) {
        return true;
      }
    }
  } else if (value.isObject()) {
    const auto& object = value.toObjectRef();
    for (size_t i = 0; i < object.slots().size(); ++i) {
      if (visit(object.getSlot(i), [&] { return '.' + object.type()->getAttributeName(i); })) {
        return true;
      }
    }
  }
  return false;
}

bool canBeSent(const c10::IValue& value, Place place) {
  if (value.isTensor()) {
    return !whyNotSent(value.toTensor(), place);
  }
  return !anyPart(value, [place](const c10::IValue& part, const auto& /*step*/) { return !canBeSent(part, place); });
}

std::string typeOf(const at::Tensor& tensor) {
  const auto type = py::type::of(py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)));
  return py::str("{}.{}").format(type.attr("__module__"), type.attr("__qualname__"));
}

// Empty if all of it can be sent.
std::string whyNotSent(const c10::IValue& value, Place place, const std::string& path) {
  if (value.isTensor()) {
    const auto why = whyNotSent(value.toTensor(), place);
    return why ? c10::str(path, " (of type ", typeOf(value.toTensor()), ") cannot be sent to another worker: ", *why)
               : std::string();
  }
  std::string text;
  anyPart(value, [&](const c10::IValue& part, const auto& step) {
    text = whyNotSent(part, place, path + step());
    return !text.empty();
  });
  return text;
}

} // namespace

void checkArguments(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t positional) {
  for (size_t i = 0; i < stack.size(); ++i) {
    if (!canBeSent(stack[i], Place::kRequest)) {
      const bool named = i >= positional;
      throw py::type_error(whyNotSent(
          stack[i], Place::kRequest,
          named ? c10::str("kwargs['", schema.arguments().at(i).name(), "']") : c10::str("args[", i, ']')));
    }
  }
}

void checkResult(const c10::IValue& result) {
  if (!canBeSent(result, Place::kResult)) {
    const Gil gil;
    throw std::runtime_error(whyNotSent(result, Place::kResult, "result"));
  }
}

} // namespace torch_rpc_mpi
