#include "service.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include <ATen/ops/empty.h>

#include "allocations.h"
#include "trace.h"

namespace torch_rpc_mpi::simulation {

namespace rpc = torch::distributed::rpc;

namespace {

constexpr unsigned kQuestion = 17, kAnswer = 101; // salts

char byteAt(const Call& call, unsigned salt, size_t part, size_t offset) {
  const uint64_t mixed =
      (static_cast<uint64_t>(call.index) * 1000003 + salt * 8191 + part * 131 + offset) * 2654435761U;
  return static_cast<char>(mixed >> 16);
}

RpcMessage messageOf(const Call& call, unsigned salt) {
  const bool question = salt == kQuestion;
  const std::string head = std::string(question ? "q " : "a ") + std::to_string(call.index) + " ";
  std::vector<char> payload(head.begin(), head.end());
  for (size_t i = 0; i < call.padding; ++i) {
    payload.push_back(byteAt(call, salt, 99, i));
  }
  std::vector<at::Tensor> tensors;
  for (size_t part = 0; part < call.tensors.size(); ++part) {
    tensors.push_back(at::empty({static_cast<int64_t>(call.tensors[part])}, at::TensorOptions(at::kByte)));
    char* data = static_cast<char*>(tensors.back().data_ptr());
    for (size_t i = 0; i < call.tensors[part]; ++i) {
      data[i] = byteAt(call, salt, part, i);
    }
  }
  return c10::make_intrusive<rpc::Message>(
      std::move(payload), std::move(tensors), question ? rpc::MessageType::SCRIPT_CALL : rpc::MessageType::SCRIPT_RET);
}

std::string compare(const rpc::Message& message, const Call& call, unsigned salt) {
  const RpcMessage expected = messageOf(call, salt);
  if (message.payload() != expected->payload()) {
    return "its text is another's, or spoiled: " +
        std::string(
               message.payload().begin(), message.payload().begin() + std::min<size_t>(message.payload().size(), 8));
  }
  if (message.tensors().size() != expected->tensors().size()) {
    return "it has " + std::to_string(message.tensors().size()) + " tensors";
  }
  for (size_t part = 0; part < call.tensors.size(); ++part) {
    const at::Tensor& tensor = message.tensors()[part];
    const auto* data = static_cast<const char*>(tensor.data_ptr());
    const auto* should = static_cast<const char*>(expected->tensors()[part].data_ptr());
    if (tensor.nbytes() != call.tensors[part] || !std::equal(should, should + call.tensors[part], data)) {
      return "the data of its tensor " + std::to_string(part) + " are not those that were sent";
    }
  }
  return {};
}

} // namespace

RpcMessage questionOf(const Call& call) {
  return messageOf(call, kQuestion);
}

std::string checkAnswer(const Call& call, const rpc::Message& answer) {
  return compare(answer, call, kAnswer);
}

JitFuturePtr Service::processMessage(rpc::Message& request, std::vector<c10::Stream>) const {
  JitFuturePtr future;
  Function function{};
  {
    const testing::OwnAllocations own;
    const std::string text(request.payload().begin(), request.payload().end());
    int index = -1;
    if (std::sscanf(text.c_str(), "q %d ", &index) != 1 || index < 0 ||
        index >= static_cast<int>(oracle_.callsMade())) {
      trace().fail("a request arrives that nobody has made");
    }
    const Call& call = oracle_.call(index);
    if (const std::string wrong = compare(request, call, kQuestion); !wrong.empty()) {
      trace().fail("the request of call " + std::to_string(index) + ": " + wrong);
    }
    oracle_.served(index);
    function = call.function;
    if (function == Function::kThrow) {
      throw std::runtime_error("the function failed");
    }
    future = c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get());
    if (function == Function::kHold) {
      held_.push_back({index, future});
    } else if (function == Function::kNested) {
      callAgain_(index, [this, index, future](bool answered) {
        if (answered) {
          answer(oracle_.call(index), future);
        } else {
          future->setError(std::make_exception_ptr(std::runtime_error("the function failed: so did what it called")));
        }
      });
    } else {
      answer(call, future);
    }
  }
  if (function == Function::kNoMemory) {
    testing::failAllocations(2); // of the response, and of the error that says so
  }
  return future;
}

void Service::answer(const Call& call, const JitFuturePtr& future) {
  future->markCompleted(at::IValue(messageOf(call, kAnswer)));
}

void Service::release(size_t which) {
  const Held held = std::move(held_[which]);
  held_.erase(held_.begin() + static_cast<ptrdiff_t>(which));
  trace().note("releases", held.index);
  answer(oracle_.call(held.index), held.future);
}

} // namespace torch_rpc_mpi::simulation
