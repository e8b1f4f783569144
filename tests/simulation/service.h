// What workers ask one another, and how they answer.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <torch/csrc/distributed/rpc/message.h>
#include <torch/csrc/distributed/rpc/request_callback.h>

#include "agent/call_table.h"
#include "codec/rpc_message.h"
#include "oracle.h"

namespace torch_rpc_mpi::simulation {

// Every byte of a question and of its answer follows from the call's index, so that both ends can check all of them.
RpcMessage questionOf(const Call& call);
// Returns what is wrong with it, or an empty text.
std::string checkAnswer(const Call& call, const torch::distributed::rpc::Message& answer);

// Makes a call for a request that is being served; `then` hears whether it was answered.
using CallAgain = std::function<void(int outer, const std::function<void(bool)>& then)>;

// The functions of one rank.
class Service final : public torch::distributed::rpc::RequestCallback {
 public:
  Service(Oracle& oracle, CallAgain callAgain) : oracle_(oracle), callAgain_(std::move(callAgain)) {}

  size_t held() const {
    return held_.size();
  }
  // Answers one that is held.
  void release(size_t which);

 protected:
  JitFuturePtr processMessage(torch::distributed::rpc::Message& request, std::vector<c10::Stream> streams)
      const override;

 private:
  struct Held {
    int index;
    JitFuturePtr future;
  };
  static void answer(const Call& call, const JitFuturePtr& future);

  Oracle& oracle_;
  const CallAgain callAgain_;
  mutable std::vector<Held> held_;
};

} // namespace torch_rpc_mpi::simulation
