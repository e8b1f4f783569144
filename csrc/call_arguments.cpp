#include "call_arguments.h"

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
      if (visit(entry.value(), [&] { return c10::str('[', entry.key(), ']'); })) {
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

bool canBeSent(const c10::IValue& value) {
  if (value.isTensor()) {
    return !whyNotSent(value.toTensor(), Place::kRequest);
  }
  return !anyPart(value, [](const c10::IValue& part, const auto& /*step*/) { return !canBeSent(part); });
}

std::string typeOf(const at::Tensor& tensor) {
  const auto type = py::type::of(py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)));
  return py::str("{}.{}").format(type.attr("__module__"), type.attr("__qualname__"));
}

void explain(const c10::IValue& value, const std::string& path) {
  if (value.isTensor()) {
    if (const auto why = whyNotSent(value.toTensor(), Place::kRequest)) {
      throw py::type_error(
          c10::str(path, " (of type ", typeOf(value.toTensor()), ") cannot be sent to another worker: ", *why));
    }
    return;
  }
  anyPart(value, [&](const c10::IValue& part, const auto& step) {
    explain(part, path + step());
    return false;
  });
}

} // namespace

void checkArguments(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t positional) {
  for (size_t i = 0; i < stack.size(); ++i) {
    if (!canBeSent(stack[i])) {
      const bool named = i >= positional;
      explain(
          stack[i], named ? c10::str("kwargs['", schema.arguments().at(i).name(), "']") : c10::str("args[", i, ']'));
    }
  }
}

} // namespace torch_rpc_mpi
