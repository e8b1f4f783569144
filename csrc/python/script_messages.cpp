#include "python/script_messages.h"

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/rpc/rpc_agent.h>
#include <torch/csrc/distributed/rpc/script_call.h>
#include <torch/csrc/distributed/rpc/script_remote_call.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace torch_rpc_mpi {

namespace {

namespace rpc = torch::distributed::rpc;

using OperatorPtr = std::shared_ptr<torch::jit::Operator>;
using Values = std::vector<c10::IValue>;

constexpr std::string_view kInSchemas = "aten::";
constexpr std::string_view kInMessages = "torch.ops.aten.";

c10::intrusive_ptr<rpc::Message> toMessage(Values values, rpc::MessageType type) {
  std::vector<at::Tensor> tensors;
  auto payload = torch::jit::pickle(c10::ivalue::Tuple::create(std::move(values)), &tensors);
  return c10::make_intrusive<rpc::Message>(std::move(payload), std::move(tensors), type);
}

// Operators by the texts of their schemas, those that are registered.
class KnownOperators {
 public:
  OperatorPtr find(const std::string& schema) {
    if (const auto known = recall(schema)) {
      if (isRegistered(*known)) {
        return known->op;
      }
      const std::lock_guard lock(mutex_);
      operators_.erase(schema);
    }
    const auto symbol = c10::Symbol::fromQualString(torch::jit::parseSchema(schema).name());
    for (const OperatorPtr& op : torch::jit::getAllOperatorsFor(symbol)) {
      if (toString(op->schema()) == schema) {
        const std::lock_guard lock(mutex_);
        operators_.insert_or_assign(schema, Known{symbol, op});
        return op;
      }
    }
    TORCH_CHECK(
        false, "Cannot find matching operator for schema ", schema,
        ". The library that registers it must be loaded at this worker too");
  }

 private:
  struct Known {
    c10::Symbol symbol;
    OperatorPtr op;
  };

  std::optional<Known> recall(const std::string& schema) {
    const std::lock_guard lock(mutex_);
    const auto known = operators_.find(schema);
    return known == operators_.end() ? std::nullopt : std::optional(known->second);
  }
  // Operators may come and go at any time (torch.library, extensions).
  static bool isRegistered(const Known& known) {
    const auto all = torch::jit::getAllOperatorsFor(known.symbol);
    return std::find(all.begin(), all.end(), known.op) != all.end();
  }

  std::mutex mutex_;
  std::unordered_map<std::string, Known> operators_; // guarded by mutex_
};

KnownOperators& knownOperators() {
  // Never destroyed: it holds operators, and torch's registry may be gone first at exit.
  static auto& known = *new KnownOperators();
  return known;
}

// What stands at the end of `values`, which it is taken from: what is called, and for a TorchScript function how.
struct Callee {
  explicit Callee(Values& values) {
    TORCH_CHECK(values.size() > 1, "At least 2 IValues are required to build a ScriptCall.");
    name = take(values).toStringRef();
    if (std::string_view(name).substr(0, kInMessages.size()) == kInMessages) {
      op = knownOperators().find(take(values).toStringRef());
    } else {
      isAsync = take(values).toBool();
    }
  }
  static c10::IValue take(Values& values) {
    c10::IValue last = std::move(values.back());
    values.pop_back();
    return last;
  }

  OperatorPtr op; // null: a TorchScript function
  std::string name;
  bool isAsync = false;
};

} // namespace

BuiltinName::BuiltinName(const torch::jit::Operator& op) : schema(toString(op.schema())) {
  const std::string& name = op.schema().name();
  TORCH_CHECK(name.find("::") == name.rfind("::") && name.rfind(kInSchemas, 0) == 0, "Unexpected operator name ", name);
  qualifiedName = std::string(kInMessages) + name.substr(kInSchemas.size());
}

c10::intrusive_ptr<rpc::Message> scriptCall(const BuiltinName& name, torch::jit::Stack stack) {
  stack.push_back(name.schema);
  stack.push_back(name.qualifiedName);
  return toMessage(std::move(stack), rpc::MessageType::SCRIPT_CALL);
}

c10::intrusive_ptr<rpc::Message> scriptRemoteCall(
    const BuiltinName& name,
    torch::jit::Stack stack,
    const rpc::RRefId& rrefId,
    const rpc::ForkId& forkId) {
  stack.push_back(name.schema);
  stack.push_back(name.qualifiedName);
  stack.push_back(rrefId.toIValue());
  stack.push_back(forkId.toIValue());
  return toMessage(std::move(stack), rpc::MessageType::SCRIPT_REMOTE_CALL);
}

std::unique_ptr<rpc::RpcCommandBase> readScriptCall(const rpc::Message& message) {
  const auto agent = rpc::RpcAgent::getCurrentRpcAgent();
  const c10::IValue content = torch::jit::unpickle(
      message.payload().data(), message.payload().size(), *agent->getTypeResolver(), message.tensors());
  Values values = content.toTupleRef().elements().vec();
  if (message.type() == rpc::MessageType::SCRIPT_CALL) {
    Callee callee(values);
    return callee.op
        ? std::make_unique<rpc::ScriptCall>(std::move(callee.op), std::move(values))
        : std::make_unique<rpc::ScriptCall>(c10::QualifiedName(callee.name), std::move(values), callee.isAsync);
  }
  TORCH_INTERNAL_ASSERT(message.type() == rpc::MessageType::SCRIPT_REMOTE_CALL);
  TORCH_CHECK(values.size() > 3, "At least 4 IValues are required to build a ScriptRemoteCall.");
  const auto forkId = rpc::ForkId::fromIValue(Callee::take(values));
  const auto rrefId = rpc::RRefId::fromIValue(Callee::take(values));
  Callee callee(values);
  return callee.op ? std::make_unique<rpc::ScriptRemoteCall>(std::move(callee.op), std::move(values), rrefId, forkId)
                   : std::make_unique<rpc::ScriptRemoteCall>(
                         c10::QualifiedName(callee.name), std::move(values), rrefId, forkId, callee.isAsync);
}

} // namespace torch_rpc_mpi
