#include "agent/faults.h"

#include <torch/csrc/distributed/rpc/utils.h>

#include "check.h"

using namespace torch_rpc_mpi;
namespace rpc = torch::distributed::rpc;

namespace {

c10::intrusive_ptr<rpc::Message> message(rpc::MessageType type, const std::string& text) {
  return c10::make_intrusive<rpc::Message>(
      std::vector<char>(text.begin(), text.end()), std::vector<at::Tensor>(), type);
}

rpc::RPCErrorType typeOf(const std::string& error) {
  const auto future = c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get());
  future->setError(std::make_exception_ptr(std::runtime_error(error)));
  return rpc::getRPCErrorType(*future);
}

} // namespace

TEST(faults_fail_each_message_as_often_as_asked) {
  Faults faults({{"RREF_FORK_REQUEST", "PYTHON_CALL"}, {}, 2});
  for (const auto& each :
       {message(rpc::RREF_FORK_REQUEST, "a"), message(rpc::RREF_FORK_REQUEST, "b"), message(rpc::PYTHON_CALL, "a")}) {
    for (const bool fails : {true, true, false, false}) {
      const auto failure = faults.failureOf(*each);
      CHECK_EQUAL(failure.has_value(), fails);
      CHECK_THAT(!fails || typeOf(*failure) == rpc::RPCErrorType::INTENTIONAL_FAILURE);
    }
  }
  CHECK_THAT(!faults.failureOf(*message(rpc::SCRIPT_CALL, "a")));
}

TEST(faults_are_checked) {
  CHECK_THROWS(
      Faults({{"NO_CALL"}, {}, 1}), "No request is called 'NO_CALL'. The requests are SCRIPT_CALL, PYTHON_CALL");
  CHECK_THROWS(Faults({{}, {{"PYTHON_RET", 1}}, 1}), "No request is called 'PYTHON_RET'");
  CHECK_THROWS(Faults({{}, {{"PYTHON_CALL", -1}}, 1}), "The delay of PYTHON_CALL must not be negative");
  CHECK_THROWS(Faults({{"PYTHON_CALL"}, {}, -1}), "num_fail_sends must not be negative");
}

TEST(faults_delay_what_they_are_asked_to) {
  const Faults faults({{}, {{"SCRIPT_CALL", 0.25}}, 0});
  CHECK_EQUAL(faults.delayOf(rpc::SCRIPT_CALL).count(), 250);
  CHECK_EQUAL(faults.delayOf(rpc::PYTHON_CALL).count(), 0);
}
