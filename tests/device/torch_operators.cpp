// Every other operator, by one function: it is queued on the current stream of its tensors' device, and there the CPU's
// kernel does it. What comes out is known before, from torch's meta kernel. Where there is none, or where the result is
// no tensor, it runs at once, after its stream.
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/resize_native.h>
#include <torch/library.h>

#include "devices.h"
#include "runtime.h"
#include "torch_aliases.h"
#include "torch_streams.h"

namespace rpctest {

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::jit::Stack;

// An operator's call. `arguments` are what it was called with.
struct Call {
  const c10::OperatorHandle& op;
  std::vector<c10::IValue> arguments;
  c10::Device device;
};

// The names of the operators that were not queued. Never destroyed.
struct Unqueued {
  std::mutex mutex;
  std::set<std::string> names; // under the lock, as is the text
  std::string text;
};

Unqueued& unqueued() {
  static auto* all = new Unqueued;
  return *all;
}

bool writes(const c10::AliasInfo* alias) {
  return alias != nullptr && alias->isWrite();
}

// The tensors of an argument, which may be one or a list of them.
template <class Visit>
void forTensors(const c10::IValue& argument, const Visit& visit) {
  if (argument.isTensor()) {
    visit(argument.toTensor());
  } else if (argument.isList()) {
    for (const c10::IValue& element : argument.toListRef()) {
      forTensors(element, visit);
    }
  }
}

template <class Change>
c10::IValue withTensors(const c10::IValue& argument, const Change& change) {
  if (argument.isTensor()) {
    return argument.toTensor().defined() ? c10::IValue(change(argument.toTensor())) : argument;
  }
  bool has = false;
  forTensors(argument, [&](const at::Tensor&) { has = true; });
  if (!has) {
    return argument;
  }
  c10::impl::GenericList list(argument.toList().elementType());
  for (const c10::IValue& element : argument.toListRef()) {
    list.push_back(withTensors(element, change));
  }
  return list;
}

// As CUDA's kernels: all on one device, but for numbers that are tensors of the CPU.
c10::Device deviceOf(const std::vector<c10::IValue>& arguments) {
  c10::Device device = at::kCPU;
  for (const c10::IValue& argument : arguments) {
    forTensors(argument, [&](const at::Tensor& tensor) {
      if (tensor.defined() && tensor.is_privateuseone()) {
        TORCH_CHECK(
            device.is_cpu() || device == tensor.device(),
            "Expected all tensors to be on the same device, but found at least two devices, ", device, " and ",
            tensor.device(), "!");
        device = tensor.device();
      }
    });
  }
  return device;
}

bool canBeQueued(const Call& call) {
  const auto& schema = call.op.schema();
  bool can = !call.device.is_cpu() && !schema.returns().empty() &&
      call.op.hasComputedKernelForDispatchKey(DispatchKey::Meta) &&
      call.op.hasComputedKernelForDispatchKey(DispatchKey::CPU);
  for (const auto& returned : schema.returns()) {
    const bool view = returned.alias_info() != nullptr && !writes(returned.alias_info());
    can = can && returned.type()->kind() == c10::TypeKind::TensorType && !view;
  }
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    const auto& argument = call.arguments[i];
    // Random numbers would depend on the order in which threads take them.
    can = can && !argument.isDevice() && !argument.isStream() &&
        schema.arguments()[i].type()->str().find("Generator") == std::string::npos;
    forTensors(argument, [&](const at::Tensor& tensor) {
      can = can && (!tensor.defined() || tensor.is_privateuseone() || (tensor.is_cpu() && tensor.dim() == 0));
    });
  }
  return can;
}

at::Tensor asMeta(const at::Tensor& tensor) {
  return tensor.is_cpu() ? tensor
                         : at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

at::Tensor asAlias(const at::Tensor& tensor) {
  if (!tensor.is_cpu()) {
    return aliasOf(tensor);
  }
  at::Tensor number = at::clone(tensor);
  number.unsafeGetTensorImpl()->set_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number());
  return number;
}

template <class Change>
Stack changed(const Call& call, const Change& change) {
  Stack stack;
  for (const c10::IValue& argument : call.arguments) {
    stack.push_back(withTensors(argument, change));
  }
  return stack;
}

// The argument that a result is, or -1.
int64_t argumentOf(const c10::OperatorHandle& op, const c10::Argument& returned) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; returned.alias_info() != nullptr && i < arguments.size(); ++i) {
    if (writes(arguments[i].alias_info()) && *arguments[i].alias_info() == *returned.alias_info()) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

// Runs the meta kernel, which also finds wrong arguments, and returns the call's results with nothing in them yet.
std::vector<c10::IValue> makeResults(const Call& call) {
  const auto& returns = call.op.schema().returns();
  Stack meta = changed(call, asMeta);
  const Stack before = meta;
  call.op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &meta);
  std::vector<c10::IValue> results;
  for (size_t i = 0; i < returns.size(); ++i) {
    const int64_t index = argumentOf(call.op, returns[i]);
    const at::Tensor& shape = meta[i].toTensor();
    if (index >= 0) {
      const at::Tensor& given = call.arguments[static_cast<size_t>(index)].toTensor();
      if (given.sizes() != before[static_cast<size_t>(index)].toTensor().sizes()) {
        at::native::resize_(given, before[static_cast<size_t>(index)].toTensor().sizes(), std::nullopt);
      }
      results.emplace_back(given);
    } else {
      results.emplace_back(
          shape.defined() ? at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(call.device))
                          : at::Tensor());
    }
  }
  return results;
}

// What is written in place lies in its argument then. Results that are new, or go into an `out`, are copied to where
// they belong: a kernel may use an `out` for something larger first.
void queue(const Call& call, const std::vector<c10::IValue>& results) {
  const auto& schema = call.op.schema();
  std::vector<at::Tensor> targets;
  std::vector<int64_t> outs;
  for (size_t i = 0; i < results.size(); ++i) {
    const int64_t index = argumentOf(call.op, schema.returns()[i]);
    const bool out = index >= 0 && schema.arguments()[static_cast<size_t>(index)].is_out();
    outs.push_back(out ? index : -1);
    const at::Tensor& result = results[i].toTensor();
    targets.push_back(result.defined() && (out || index < 0) ? aliasOf(result) : at::Tensor());
  }
  pushKernel(currentQueue(call.device), [op = call.op, arguments = changed(call, asAlias), targets, outs] {
    Stack stack = arguments;
    for (size_t i = 0; i < outs.size(); ++i) {
      if (outs[i] >= 0) {
        stack[static_cast<size_t>(outs[i])] = at::empty({0}, targets[i].options());
      }
    }
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
    for (size_t i = 0; i < targets.size(); ++i) {
      if (targets[i].defined()) {
        targets[i].copy_(stack[i].toTensor());
      }
    }
  });
}

bool tryToQueue(const Call& call, std::vector<c10::IValue>* results) {
  if (!canBeQueued(call)) {
    return false;
  }
  try {
    *results = makeResults(call);
  } catch (const c10::NotImplementedError&) { // the meta kernel only says that there is none
    return false;
  }
  queue(call, *results);
  return true;
}

void runOperator(const c10::OperatorHandle& op, Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size()).vec();
  std::vector<c10::IValue> results;
  if (tryToQueue({op, arguments, deviceOf(arguments)}, &results)) {
    torch::jit::drop(*stack, arguments.size());
    stack->insert(stack->end(), results.begin(), results.end());
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(unqueued().mutex);
    unqueued().names.insert(c10::toString(op.operator_name()));
  }
  at::native::cpu_fallback(op, stack); // its copies to the host wait for the current stream
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&runOperator>());
}

} // namespace

} // namespace rpctest

const char* rpctestUnqueued() {
  auto& all = rpctest::unqueued();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.text.clear();
  for (const std::string& name : all.names) {
    all.text += name + "\n";
  }
  return all.text.c_str();
}
