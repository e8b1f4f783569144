// The calls of a worker to itself: nothing is sent, but callee and caller each have tensors of their own.
#pragma once

#include <cstdint>
#include <memory>

#include "agent/agent_options.h"
#include "agent/call_table.h"
#include "agent/completion.h"
#include "agent/server.h"
#include "codec/own_copy.h"
#include "engine/engine.h"

namespace torch_rpc_mpi {

// Thread-safe: the call table guards itself, the rest is immutable.
class OwnCalls final : public SelfCaller {
 public:
  // engine: there when the first call is made.
  OwnCalls(
      int rank,
      CallTable& calls,
      Completion& completion,
      Server& server,
      const std::shared_ptr<Engine>& engine,
      std::shared_ptr<Devices> devices,
      const AgentOptions::OnLateResponse& onLateResponse)
      : rank_(rank),
        calls_(calls),
        completion_(completion),
        server_(server),
        engine_(engine),
        devices_(std::move(devices)),
        onLateResponse_(onLateResponse) {}

  // onDevices: null if no tensor is on a device, or is to be.
  void post(
      uint64_t id,
      const torch::distributed::rpc::Message& message,
      const OutboundSlices* onDevices,
      Clock::time_point deadline);
  void onOwnResponse(uint64_t id, MakeResponse response) noexcept override;
  void onOwnResponse(uint64_t id, RpcMessage response, const OutboundSlices& onDevices) override;

 private:
  class ResponseTask;
  class CopiedTask;

  void whenCopied(OwnCopy copy, TaskPtr task);
  void letGoOf(const MakeResponse& late) noexcept;

  const int rank_;
  CallTable& calls_;
  Completion& completion_;
  Server& server_;
  const std::shared_ptr<Engine>& engine_;
  const std::shared_ptr<Devices> devices_; // null: none are used
  const AgentOptions::OnLateResponse onLateResponse_;
};

} // namespace torch_rpc_mpi
