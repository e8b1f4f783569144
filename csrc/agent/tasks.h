// What the agent's engine threads run. Private to agent/.
#pragma once

#include "agent/mpi_agent.h"

namespace torch_rpc_mpi {

// A request that arrived.
class MpiAgent::RequestTask final : public Task {
 public:
  RequestTask(MpiAgent& agent, InboundMessage inbound) : agent_(agent), inbound_(std::move(inbound)) {}
  Kind kind() const override {
    return inbound_.header.secondAttempt != 0 ? Kind::kSecondAttempt : Kind::kRequest;
  }
  void run() noexcept override;

 private:
  MpiAgent& agent_;
  InboundMessage inbound_;
};

// A request of this rank to itself.
class MpiAgent::LocalRequestTask final : public Task {
 public:
  LocalRequestTask(MpiAgent& agent, uint64_t id, RpcMessage message)
      : agent_(agent),
        id_(id),
        message_(std::move(message)) {}
  Kind kind() const override {
    return Kind::kRequest;
  }
  void run() noexcept override;

 private:
  MpiAgent& agent_;
  const uint64_t id_;
  RpcMessage message_;
};

// Completes the future of a call, whatever becomes of the task: if the engine stops before it has run, with an error.
class MpiAgent::CompletionTask : public Task {
 public:
  CompletionTask(MpiAgent& agent, PendingCall call) : agent_(agent), call_(std::move(call)) {
    agent_.completing_.fetch_add(1);
  }
  ~CompletionTask() override;
  Kind kind() const override {
    return Kind::kCompletion;
  }
  bool completes(const void* awaited) const override {
    return call_.future.get() == awaited;
  }

 protected:
  const Completion& completion() const {
    return agent_.completion_;
  }
  PendingCall take() {
    return std::exchange(call_, PendingCall());
  }

 private:
  MpiAgent& agent_;
  PendingCall call_;
};

// Of a call whose response arrived.
class MpiAgent::ResponseTask final : public CompletionTask {
 public:
  ResponseTask(MpiAgent& agent, PendingCall call, InboundMessage inbound)
      : CompletionTask(agent, std::move(call)),
        inbound_(std::move(inbound)) {}
  void run() noexcept override;

 private:
  InboundMessage inbound_;
};

// Of a call that failed here.
class MpiAgent::ErrorTask final : public CompletionTask {
 public:
  // With call.failure, which is also what becomes of it if the engine stops first.
  ErrorTask(MpiAgent& agent, PendingCall call) : CompletionTask(agent, std::move(call)) {}
  void run() noexcept override {
    const PendingCall call = take();
    completion().fail(call, call.failure);
  }
};

// Lets go of messages that were sent, or tells those that were not: their tensors may belong to Python objects.
class MpiAgent::ReleaseTask final : public Task {
 public:
  explicit ReleaseTask(DoneMessages done) : done_(std::move(done)) {}
  Kind kind() const override {
    return Kind::kCompletion;
  }
  void run() noexcept override {
    for (auto& [message, reason] : done_.failed) {
      message->failed(reason);
    }
  }

 private:
  DoneMessages done_;
};

} // namespace torch_rpc_mpi
