// The callee's side of the agent: requests in, responses out.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include <c10/util/FunctionRef.h>
#include <torch/csrc/distributed/rpc/request_callback.h>

#include "agent/call_table.h"
#include "agent/device_maps.h"
#include "agent/held_by_peers.h"
#include "agent/late_calls.h"
#include "agent/membership.h"
#include "agent/outbox.h"
#include "agent/owed_responses.h"
#include "agent/request_states.h"
#include "agent/running_requests.h"
#include "agent/unbegun_requests.h"

namespace torch_rpc_mpi {

using MakeResponse = c10::function_ref<RpcMessage()>;

// Whom a worker calls that calls itself.
class SelfCaller {
 public:
  virtual ~SelfCaller() = default;
  // What `response` throws is the call's error.
  virtual void onOwnResponse(uint64_t id, MakeResponse response) noexcept = 0;
  // The same for one with tensors that are on devices, or are to be. It may throw, and then the call still waits.
  virtual void onOwnResponse(uint64_t id, RpcMessage response, const OutboundSlices& onDevices) = 0;
};

// Thread-safe: the counts are atomics; owner_ and selfCaller_ are set before the first request comes; the rest is
// immutable, or guards itself.
class Server final : private SendFailureListener {
 public:
  using ThreadHook = std::function<void(const std::function<void()>& body)>;
  using RequestCallback = torch::distributed::rpc::RequestCallback;

  Server(
      const Membership& members,
      Exchange& exchange,
      Outbox& outbox,
      const std::shared_ptr<Engine>& engine,
      RequestCallback& callback,
      int numWorkerThreads,
      ThreadHook threadHook,
      const DeviceMaps& deviceMaps);

  // owner: while it lives, so does this; a function may return a future that completes later than that.
  void start(std::weak_ptr<const void> owner, SelfCaller& selfCaller) {
    owner_ = std::move(owner);
    selfCaller_ = &selfCaller;
  }
  // What serves a request that has arrived, or one of this worker to itself. Each counts from now on. Null if its
  // caller does not wait for it any more.
  TaskPtr arrived(InboundMessage&& request);
  TaskPtr ownRequest(uint64_t id, RpcMessage request, Streams streams, Clock::time_point deadline);
  // Of the token's holder: a caller does not wait for that call any more. The request is dropped if it has not begun.
  // comes: something of that caller has arrived in part, this request perhaps.
  void forget(int source, uint64_t id, bool comes);

  // What runs the messages that a lost peer would have sent. See Note [What the lost held].
  TaskPtr lastMessagesOf(int peer);
  HeldByPeers& heldByPeers() {
    return held_;
  }

  int64_t serving() const { // requests between arrival and response
    return serving_.load();
  }
  int64_t servingAsync() const { // of them, those whose function returned a future
    return servingAsync_.load();
  }

  const RunningRequests& running() const {
    return *running_;
  }
  // See Note [Late calls]: of calls of `source`.
  Statement stateOf(ProgressToken& token, int source, const std::vector<uint64_t>& ids) const {
    return states_.of(token, source, ids);
  }

  // Of the token's holder: callers that are to be told that there was no memory for their response.
  bool owes() const {
    return owed_.any();
  }
  void pay(ProgressToken& token);
  void payAgain() { // what could not be paid
    owed_.again();
  }

 private:
  class Served;
  class RequestTask;
  class LastMessagesTask;

  void serve(InboundMessage&& inbound) noexcept;
  void serveOwn(uint64_t id, RpcMessage request, Streams streams) noexcept;
  void decodeAndRun(InboundMessage&& inbound, ReplyTo reply);
  void run(RpcMessage request, ReplyTo reply, Streams streams);
  JitFuturePtr process(torch::distributed::rpc::Message& request, Streams streams) const;
  void respond(ReplyTo reply, MakeResponse response) noexcept;
  void respondWith(ReplyTo reply, torch::distributed::rpc::JitFuture& done) noexcept;
  void respondToSelf(ReplyTo reply, MakeResponse response) noexcept;
  void send(ReplyTo reply, RpcMessage response);
  void owe(ReplyTo reply, const std::exception& error) noexcept;
  RpcMessage responseOf(torch::distributed::rpc::JitFuture& future, uint64_t id) const;
  RpcMessage errorResponse(const std::string& what, uint64_t id) const;
  void onSendFailed(FrameKind kind, int peer, uint64_t callId, const std::string& reason) noexcept override;

  const Membership& members_;
  Exchange& exchange_;
  Outbox& outbox_;
  SelfCaller* selfCaller_ = nullptr;
  RequestCallback& callback_;
  const ThreadHook threadHook_;
  const DeviceMaps& deviceMaps_;
  std::weak_ptr<const void> owner_;
  HeldByPeers held_;

  std::atomic<int64_t> serving_{0};
  std::atomic<int64_t> servingAsync_{0};

  UnbegunRequests unbegun_;
  const std::shared_ptr<RunningRequests> running_; // a future that a function returned may outlive this
  const RequestStates states_;
  OwedResponses owed_;
};

} // namespace torch_rpc_mpi
