#include "agent/own_calls.h"

#include <functional>
#include <utility>

#include "agent/completion_task.h"
#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

// Of a call whose response comes from a device to the host.
class OwnCalls::ResponseTask final : public CompletionTask {
 public:
  ResponseTask(Completion& completion, RpcMessage response, Streams streams)
      : CompletionTask(completion),
        response_(std::move(response)),
        streams_(std::move(streams)) {}
  void run() noexcept override {
    completion().complete(take(), response_, streams_);
  }

 private:
  const RpcMessage response_;
  const Streams streams_;
};

// One that runs when what comes from a device is in pinned memory, and takes it from there.
class OwnCalls::CopiedTask final : public Task {
 public:
  CopiedTask(std::function<void()> finish, TaskPtr task) : finish_(std::move(finish)), task_(std::move(task)) {}
  Kind kind() const override {
    return task_->kind();
  }
  bool completes(const void* awaited) const override {
    return task_->completes(awaited);
  }
  void run() noexcept override {
    finish_();
    task_->run();
  }

 private:
  const std::function<void()> finish_;
  const TaskPtr task_;
};

void OwnCalls::post(
    uint64_t id,
    const rpc::Message& message,
    const OutboundSlices* onDevices,
    Clock::time_point deadline) {
  HeldByPeers::made({});
  if (onDevices == nullptr) {
    Streams streams = devices_ == nullptr ? Streams() : devices_->poolStreams();
    engine_->post(server_.ownRequest(id, copyMessage(message), std::move(streams), deadline));
    return;
  }
  OwnCopy copy = copyMessage(message, *onDevices);
  TaskPtr task = server_.ownRequest(id, copy.message, copy.streams, deadline);
  whenCopied(std::move(copy), std::move(task));
}

void OwnCalls::onOwnResponse(uint64_t id, MakeResponse response) noexcept {
  auto call = calls_.take(id, rank_);
  if (!call) {
    letGoOf(response);
    return;
  }
  try {
    RpcMessage message = response();
    if (message->type() != rpc::MessageType::EXCEPTION) {
      message = copyMessage(*message);
    }
    completion_.complete(*call, message, devices_ == nullptr ? Streams() : devices_->poolStreams());
  } catch (const std::exception& error) {
    completion_.fail(*call, [&] { return "The response could not be sent: " + errorText(error); });
  }
}

void OwnCalls::onOwnResponse(uint64_t id, RpcMessage response, const OutboundSlices& onDevices) {
  OwnCopy copy = copyMessage(*response, onDevices);
  auto task = std::make_unique<ResponseTask>(completion_, copy.message, copy.streams);
  if (auto call = calls_.take(id, rank_)) {
    task->give(std::move(*call));
    whenCopied(std::move(copy), std::move(task));
  } else {
    letGoOf([&] { return response; });
  }
}

void OwnCalls::letGoOf(const MakeResponse& late) noexcept {
  try {
    onLateResponse_(*late());
  } catch (const std::exception&) { // nobody would be told
  }
}

// The task is run when what comes from a device to the host is there.
void OwnCalls::whenCopied(OwnCopy copy, TaskPtr task) {
  if (copy.awaited.empty()) {
    engine_->post(std::move(task));
    return;
  }
  auto finishing = std::make_shared<TaskPtr>(std::make_unique<CopiedTask>(std::move(copy.finish), std::move(task)));
  const auto later = std::make_shared<AtLast>(
      [finishing = std::move(finishing), engine = engine_] { engine->post(std::move(*finishing)); });
  for (DeviceEvent& event : copy.awaited) {
    devices_->holdUntil(std::move(event), later);
  }
  engine_->wake();
}

} // namespace torch_rpc_mpi
