// The callee's side of the agent: requests in, responses out.
#include <algorithm>
#include <new>

#include "agent/engine_work.h"
#include "agent/mpi_agent.h"
#include "agent/tasks.h"
#include "base/error_text.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

RpcMessage MpiAgent::errorResponse(const std::string& what, int64_t id) const {
  const std::string text =
      c10::str("On ", getWorkerInfo(), " (rank ", rank_, " on host ", members_.host(), "):\n", what);
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
  const Respond respond = [weak = weak_from_this(), peer, id](const std::function<RpcMessage()>& response) {
    if (const auto agent = weak.lock()) {
      try {
        agent->respond(peer, id, response());
      } catch (const std::exception& error) {
        agent->oweError(peer, id, error);
      }
      agent->serving_.fetch_sub(1);
    }
  };
  RpcMessage request;
  try {
    request = decodeMessage(std::move(inbound));
  } catch (const std::exception& error) {
    respond([&] { return errorResponse(std::string("The request could not be read: ") + errorText(error), id); });
    return;
  }
  run(std::move(request), respond);
}

JitFuturePtr MpiAgent::process(rpc::Message& request) {
  if (request.type() != rpc::MessageType::RUN_WITH_PROFILING_REQ) {
    return (*cb_)(request, {});
  }
  // torch records the remote events of a profiled call only the first time that a thread runs one (TensorPipe's
  // profiles miss them once each of its threads has had its turn): so each gets a new thread.
  JitFuturePtr future;
  std::exception_ptr error;
  startThread("a call that is profiled", [&] {
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

void MpiAgent::run(RpcMessage request, const Respond& respond) {
  const int64_t id = request->id();
  JitFuturePtr future;
  try {
    future = process(*request);
  } catch (const std::exception& error) {
    respond([&] { return errorResponse(errorText(error), id); });
    return;
  }
  if (future->completed()) {
    respond([&] { return responseOf(*future, id); });
    return;
  }
  servingAsync_.fetch_add(1);
  // Run by whoever completes the future, a user's thread perhaps.
  future->addCallback([weak = weak_from_this(), respond, id](rpc::JitFuture& done) {
    const EngineWork work;
    if (const auto agent = weak.lock()) {
      agent->servingAsync_.fetch_sub(1);
      respond([&] { return agent->responseOf(done, id); });
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
  std::unique_ptr<OutboundRpc> out;
  try {
    out = make(std::move(response));
  } catch (const std::exception& error) {
    out = make(errorResponse(std::string("The response could not be sent: ") + errorText(error), id));
  }
  submit(std::move(out), /*expectsReply=*/false);
}

// For want of memory the response could not be made. The token's holder tells the caller as soon as it can.
void MpiAgent::oweError(int peer, uint64_t id, const std::exception& error) noexcept {
  try {
    LOG(ERROR) << "The response of " << members_.describe(rank_) << " to " << members_.describe(peer)
               << " could not be made: " << error.what();
  } catch (const std::bad_alloc&) {
  }
  const std::lock_guard<std::mutex> lock(outboxMutex_);
  if (owedErrors_.size() < owedErrors_.capacity()) { // else the caller gets its timeout
    owedErrors_.emplace_back(peer, id);
    outboxFilled_ = true;
  }
}

void MpiAgent::payErrors(ProgressToken& token, std::vector<std::pair<int, uint64_t>> owed) {
  while (!owed.empty()) {
    const auto [peer, id] = owed.back();
    try {
      exchange_.post(
          token,
          std::make_unique<OutboundRpc>(
              peer, FrameKind::kResponse, id,
              errorResponse("The response could not be made: there was not enough memory", static_cast<int64_t>(id)),
              options_.exchange.eagerLimit, static_cast<SendFailureListener&>(*this)));
      owed.pop_back();
    } catch (const std::bad_alloc&) {
      break;
    }
  }
  // The next look at the neighbours tries again. No more than fit: without memory there can be no more.
  const std::lock_guard<std::mutex> lock(outboxMutex_);
  const size_t room = owedErrors_.capacity() - owedErrors_.size();
  owedErrors_.insert(owedErrors_.end(), owed.begin(), owed.begin() + std::min(room, owed.size()));
}

} // namespace torch_rpc_mpi
