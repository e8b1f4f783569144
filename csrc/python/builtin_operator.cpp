#include "python/builtin_operator.h"

#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <torch/csrc/autograd/python_variable.h>

#include "python/call_arguments.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

using Operators = std::vector<std::shared_ptr<torch::jit::Operator>>;

// What the choice of an overload may depend on in a Python object. Subclasses are kOther: they may convert to anything.
// The values are characters because they make up the key under which a choice is remembered.
enum Kind : char {
  kTensor = 't',
  kTensorOfMany = 'T', // more than one element: no number
  kInt = 'i',
  kLargeInt = 'I', // more than 64 bits
  kBool = 'b',
  kFloat = 'f',
  kComplex = 'c',
  kStr = 's',
  kNone = 'n',
  kSequence = 'l',
  kDict = 'd',
  kOther = '?',
};

struct Shape {
  Kind kind = kOther;
  Kind elements = kOther; // of a sequence: the kind of all of them
};

Kind kindOf(PyObject* object) {
  if (THPVariable_CheckExact(object)) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    const bool sizeIsKnown = !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
    return sizeIsKnown && tensor.numel() > 1 ? kTensorOfMany : kTensor;
  }
  if (object == Py_None) {
    return kNone;
  }
  const PyTypeObject* type = Py_TYPE(object);
  if (type == &PyLong_Type) {
    int overflow = 0;
    PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0 ? kInt : kLargeInt;
  }
  if (type == &PyFloat_Type) {
    return kFloat;
  }
  if (type == &PyBool_Type) {
    return kBool;
  }
  if (type == &PyList_Type || type == &PyTuple_Type) {
    return kSequence;
  }
  if (type == &PyUnicode_Type) {
    return kStr;
  }
  if (type == &PyDict_Type) {
    return kDict;
  }
  return type == &PyComplex_Type ? kComplex : kOther;
}

Shape shapeOf(PyObject* object) {
  Shape shape{kindOf(object)};
  if (shape.kind != kSequence) {
    return shape;
  }
  PyObject** items = PySequence_Fast_ITEMS(object);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
  for (Py_ssize_t i = 0; i < size; ++i) {
    const Kind kind = kindOf(items[i]);
    if (kind == kLargeInt) {
      return {kSequence, kLargeInt};
    }
    shape.elements = i == 0 || kind == shape.elements ? kind : kOther;
  }
  return shape;
}

// The kinds of which no value converts, as a string.
const char* impossibleFor(c10::TypeKind type) {
  switch (type) {
    case c10::TypeKind::TensorType:
      return "ibfcsld";
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      return "Tfcsnld";
    case c10::TypeKind::FloatType:
      return "Tcsnld";
    case c10::TypeKind::NumberType:
      return "Tsnld";
    case c10::TypeKind::BoolType:
      return "Tsld";
    case c10::TypeKind::StringType:
      return "tTibfcnld";
    case c10::TypeKind::GeneratorType:
      return "tTibfcsnld";
    case c10::TypeKind::DictType:
      return "tTibfcsnl";
    default:
      return "";
  }
}

bool cannotBe(const Shape& shape, const c10::Type& type, bool broadcast) {
  if (shape.kind == kOther) {
    return false;
  }
  if (type.kind() == c10::TypeKind::OptionalType) {
    return shape.kind != kNone && cannotBe(shape, *type.expectRef<c10::OptionalType>().getElementType(), broadcast);
  }
  if (type.kind() == c10::TypeKind::ListType) {
    if (shape.kind == kSequence) {
      return cannotBe({shape.elements}, *type.expectRef<c10::ListType>().getElementType(), false);
    }
    // With broadcast one number stands for a list of equal ones.
    return !broadcast && std::string_view("ibfcn").find(shape.kind) != std::string_view::npos;
  }
  return std::string_view(impossibleFor(type.kind())).find(shape.kind) != std::string_view::npos;
}

// A call's arguments as far as the choice of an overload looks at them.
struct Arguments {
  Arguments(const py::args& args, const py::kwargs& kwargs) {
    positional.reserve(args.size());
    for (const auto& arg : args) {
      positional.push_back(look(arg));
    }
    for (const auto& [name, value] : kwargs) {
      named.emplace_back(name.cast<std::string>(), look(value));
    }
  }

  std::string key(const std::string& opName) const {
    std::string key = opName;
    for (const Shape& shape : positional) {
      key += {',', static_cast<char>(shape.kind), static_cast<char>(shape.elements)};
    }
    for (const auto& [name, shape] : named) {
      key += ',' + name + '=' + static_cast<char>(shape.kind) + static_cast<char>(shape.elements);
    }
    return key;
  }

  bool cannotMatch(const c10::FunctionSchema& schema) const {
    // The conversion of such a number may raise an error that ends torch's search, whatever the other arguments are.
    if (hasLargeInt) {
      return false;
    }
    const auto& parameters = schema.arguments();
    if (positional.size() + named.size() > parameters.size()) {
      return true;
    }
    size_t namedUsed = 0;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const c10::Argument& parameter = parameters[i];
      const Shape* shape = i < positional.size() ? &positional[i] : find(parameter.name());
      if (i < positional.size() ? parameter.kwarg_only() : !shape && !parameter.default_value()) {
        return true;
      }
      if (shape && cannotBe(*shape, *parameter.real_type(), parameter.N().has_value())) {
        return true;
      }
      namedUsed += i >= positional.size() && shape ? 1 : 0;
    }
    return namedUsed != named.size();
  }

  const Shape* find(const std::string& name) const {
    for (const auto& [other, shape] : named) {
      if (other == name) {
        return &shape;
      }
    }
    return nullptr;
  }

  Shape look(const py::handle& value) {
    const Shape shape = shapeOf(value.ptr());
    hasLargeInt = hasLargeInt || shape.kind == kLargeInt || shape.elements == kLargeInt;
    return shape;
  }

  bool hasLargeInt = false;
  std::vector<Shape> positional;
  std::vector<std::pair<std::string, Shape>> named;
};

struct Candidate {
  std::shared_ptr<torch::jit::Operator> op;
  std::shared_ptr<const BuiltinName> name;
};

struct Choice {
  c10::Symbol symbol;
  Operators all; // as registered when the choice was made
  std::vector<Candidate> possible;
};

// Bounds what a program with ever new keyword names, say, could make us keep.
constexpr size_t kMaxChoices = 1024;

// Shared, because converting arguments runs Python code, in which another thread may come by and clear the table.
std::shared_ptr<const Choice> choose(const std::string& opName, const py::args& args, const py::kwargs& kwargs) {
  // Never destroyed: it holds operators, and torch's registry may be gone first at exit.
  static auto& choices = *new std::unordered_map<std::string, std::shared_ptr<const Choice>>();
  const Arguments arguments(args, kwargs);
  const std::string key = arguments.key(opName);
  const auto known = choices.find(key);
  // Operators may come and go at any time (torch.library, extensions).
  if (known != choices.end() && known->second->all == torch::jit::getAllOperatorsFor(known->second->symbol)) {
    return known->second;
  }
  const auto symbol = c10::Symbol::fromQualString(opName);
  auto choice = std::make_shared<Choice>(Choice{symbol, {}, {}});
  if (symbol.is_aten()) {
    choice->all = torch::jit::getAllOperatorsFor(symbol);
    for (const bool c10 : {true, false}) { // in the order in which matchAmongAll() takes them
      for (const auto& op : choice->all) {
        if (op->isC10Op() == c10 && !arguments.cannotMatch(op->schema())) {
          choice->possible.push_back({op, std::make_shared<BuiltinName>(*op)});
        }
      }
    }
  }
  if (choices.size() >= kMaxChoices) {
    choices.clear();
  }
  choices[key] = choice;
  return choice;
}

Operators select(const Operators& operators, bool c10) {
  Operators selected;
  for (const auto& op : operators) {
    if (op->isC10Op() == c10) {
      selected.push_back(op);
    }
  }
  return selected;
}

// As torch does it: those known to the dispatcher come first.
BuiltinCall matchAmongAll(
    c10::Symbol symbol,
    const std::string& opName,
    const py::args& args,
    const py::kwargs& kwargs) {
  TORCH_CHECK(
      symbol.is_aten(), "Failed to match operator name ", opName, " and arguments (args: ", args, ", kwargs: ", kwargs,
      ") to a builtin operator");
  const Operators operators = torch::jit::getAllOperatorsFor(symbol);
  TORCH_CHECK(
      !operators.empty(), "There is no builtin operator ", opName, " (called with args: ", args, ", kwargs: ", kwargs,
      "). An operator of an extension is there once the extension has been imported");
  const auto match = [&](bool c10) -> BuiltinCall {
    auto [op, stack] = torch::jit::getOpWithStack(select(operators, c10), args, kwargs);
    auto name = std::make_shared<BuiltinName>(*op);
    return {std::move(op), std::move(stack), std::move(name)};
  };
  try {
    return match(true);
  } catch (const std::runtime_error&) {
    return match(false);
  }
}

BuiltinCall match(const std::string& opName, const py::args& args, const py::kwargs& kwargs) {
  const auto choice = choose(opName, args, kwargs);
  for (const auto& [op, name] : choice->possible) {
    try {
      return {op, torch::jit::createStackForSchema(op->schema(), args, kwargs, std::nullopt), name};
    } catch (const torch::jit::schema_match_error&) {
    } catch (const std::runtime_error&) {
      break;
    }
  }
  // For torch's error, or what torch makes of an unexpected one.
  return matchAmongAll(choice->symbol, opName, args, kwargs);
}

} // namespace

BuiltinCall matchBuiltin(const std::string& opName, const py::args& args, const py::kwargs& kwargs) {
  BuiltinCall call = match(opName, args, kwargs);
  checkArguments(call.op->schema(), call.stack, args.size());
  return call;
}

BuiltinCall matchBuiltinAmongAll(const std::string& opName, const py::args& args, const py::kwargs& kwargs) {
  return matchAmongAll(c10::Symbol::fromQualString(opName), opName, args, kwargs);
}

} // namespace torch_rpc_mpi
