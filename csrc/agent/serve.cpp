// The callee's side of the agent: requests in, responses out.
#include "agent/engine_work.h"
#include "agent/mpi_agent.h"
#include "agent/tasks.h"

#include <thread>

#include "base/error_text.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

RpcMessage MpiAgent::errorResponse(const std::string& what, int64_t id) const {
  const std::string text = c10::str("On ", getWorkerInfo(), " (rank ", rank_, " on host ", hosts_[rank_], "):\n", what);
  return rpc::createExceptionResponse(text, id);
}

RpcMessage MpiAgent::responseOf(rpc::JitFuture& future, int64_t id) const {
  if (future.hasError()) {
    return errorResponse(errorText(future.exception_ptr()), id);
  }
  RpcMessage response = future.value().toCustomClass<rpc::Message>();
  response->setId(id);
  return response;
}

void MpiAgent::serve(InboundMessage inbound) {
  const int peer = inbound.source;
  const uint64_t id = inbound.header.callId;
  exchange_.released(peer, inbound.header.chargedBytes);
  RpcMessage request;
  try {
    request = decodeMessage(std::move(inbound));
  } catch (const std::exception& error) {
    respond(peer, id, errorResponse(std::string("The request could not be read: ") + errorText(error), id));
    serving_.fetch_sub(1);
    return;
  }
  run(std::move(request), [weak = weak_from_this(), peer, id](RpcMessage response) {
    if (const auto agent = weak.lock()) {
      agent->respond(peer, id, std::move(response));
      agent->serving_.fetch_sub(1);
    }
  });
}

JitFuturePtr MpiAgent::process(rpc::Message& request) {
  if (request.type() != rpc::MessageType::RUN_WITH_PROFILING_REQ) {
    return (*cb_)(request, {});
  }
  // torch records the remote events of a profiled call only the first time that a thread runs one (TensorPipe's
  // profiles miss them once each of its threads has had its turn): so each gets a new thread.
  JitFuturePtr future;
  std::exception_ptr error;
  std::thread([&] {
    options_.threadHook([&] {
      try {
        future = (*cb_)(request, {});
      } catch (...) {
        error = std::current_exception();
      }
    });
  }).join();
  if (error) {
    std::rethrow_exception(error);
  }
  return future;
}

void MpiAgent::run(RpcMessage request, const std::function<void(RpcMessage)>& respond) {
  const int64_t id = request->id();
  JitFuturePtr future;
  try {
    future = process(*request);
  } catch (const std::exception& error) {
    respond(errorResponse(errorText(error), id));
    return;
  }
  if (future->completed()) {
    respond(responseOf(*future, id));
    return;
  }
  servingAsync_.fetch_add(1);
  // Run by whoever completes the future, a user's thread perhaps.
  future->addCallback([weak = weak_from_this(), respond, id](rpc::JitFuture& done) {
    const EngineWork work;
    if (const auto agent = weak.lock()) {
      agent->servingAsync_.fetch_sub(1);
      respond(agent->responseOf(done, id));
    }
  });
}

void MpiAgent::respond(int peer, uint64_t id, RpcMessage response) {
  const auto make = [&](RpcMessage message) {
    auto out = std::make_unique<OutboundRpc>(
        peer, FrameKind::kResponse, id, std::move(message), options_.exchange.eagerLimit,
        static_cast<SendFailureListener&>(*this));
    out->encode(exchange_.frames());
    out->dropSource();
    return out;
  };
  try {
    std::unique_ptr<OutboundRpc> out;
    try {
      out = make(std::move(response));
    } catch (const std::exception& error) {
      out = make(errorResponse(std::string("The response could not be sent: ") + errorText(error), id));
    }
    submit(std::move(out), /*expectsReply=*/false);
  } catch (const std::exception& error) {
    // Only memory can be short here; the caller gets its timeout.
    LOG(ERROR) << "RPC response of " << workers_[rank_] << " to " << workers_[peer] << " is lost: " << errorText(error);
  }
}

} // namespace torch_rpc_mpi
