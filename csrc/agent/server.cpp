#include "agent/server.h"

#include <exception>
#include <new>
#include <optional>
#include <utility>

#include <c10/core/StreamGuard.h>
#include <torch/csrc/distributed/rpc/utils.h>

#include "agent/engine_work.h"
#include "base/error_text.h"
#include "base/flight_recorder.h"
#include "codec/inbound_rpc.h"
#include "host/resources.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

// A request that counts until it has its response, or is dropped before it has begun.
class Server::Served {
 public:
  explicit Served(Server& server) : server_(server) {
    server_.serving_.fetch_add(1);
  }
  ~Served() {
    if (!begun_) {
      server_.serving_.fetch_sub(1);
    }
  }
  Served(const Served&) = delete;
  Served& operator=(const Served&) = delete;

  void begin() { // respond() ends it
    begun_ = true;
  }

 private:
  Server& server_;
  bool begun_ = false;
};

// A request that has arrived and not begun: its caller may call it off.
class Server::RequestTask final : public Task {
 public:
  RequestTask(Server& server, int source, uint64_t id, ArrivedRequest&& request)
      : server_(server),
        served_(server),
        kind_(request.kind()),
        entry_(server.unbegun_, *this, source, id, std::move(request)) {}
  Kind kind() const override {
    return kind_;
  }
  void run() noexcept override {
    std::optional<ArrivedRequest> request = entry_.take();
    // Its time may have been over before there was anything to call off: its arguments were still being copied.
    if (!request || (request->own != nullptr && Clock::now() >= request->deadline)) {
      return;
    }
    served_.begin();
    if (request->own != nullptr) {
      server_.serveOwn(entry_.id(), std::move(request->own), std::move(request->streams));
    } else {
      server_.serve(std::move(request->inbound));
    }
  }

 private:
  Server& server_;
  Served served_;
  const Kind kind_;
  UnbegunRequests::Entry entry_;
};

class Server::LastMessagesTask final : public Task {
 public:
  LastMessagesTask(Server& server, int peer) : server_(server), peer_(peer) {}
  Kind kind() const override {
    return Kind::kRequest;
  }
  void run() noexcept override {
    try {
      for (const RpcMessage& message : server_.held_.lastMessagesOf(peer_)) {
        (void)server_.process(*message, {});
      }
    } catch (const std::exception& error) {
      LOG(WARNING) << "RPC could not let go of all that " << server_.members_.describe(peer_)
                   << " held here: " << errorText(error);
    }
  }

 private:
  Server& server_;
  const int peer_;
};

Server::Server(
    const Membership& members,
    Exchange& exchange,
    Outbox& outbox,
    const std::shared_ptr<Engine>& engine,
    RequestCallback& callback,
    int numWorkerThreads,
    ThreadHook threadHook,
    const DeviceMaps& deviceMaps)
    : members_(members),
      exchange_(exchange),
      outbox_(outbox),
      callback_(callback),
      threadHook_(std::move(threadHook)),
      deviceMaps_(deviceMaps),
      unbegun_(members.workers().size()),
      running_(std::make_shared<RunningRequests>()),
      states_(members.rank(), numWorkerThreads, exchange, engine, unbegun_, *running_) {}

TaskPtr Server::arrived(InboundMessage&& request) {
  const int source = request.source;
  const uint64_t id = request.header.callId;
  FlightRecorder::instance().record(
      CallEvent::kArrived, source, id, request.header.messageType, request.header.bodyBytes);
  if (unbegun_.wasForgotten(source, id)) {
    exchange_.released(source, request.header.chargedBytes);
    return nullptr;
  }
  return std::make_unique<RequestTask>(
      *this, source, id, ArrivedRequest{std::move(request), nullptr, Clock::time_point::max()});
}

TaskPtr Server::ownRequest(uint64_t id, RpcMessage request, Streams streams, Clock::time_point deadline) {
  return std::make_unique<RequestTask>(
      *this, members_.rank(), id, ArrivedRequest{{}, std::move(request), deadline, std::move(streams)});
}

TaskPtr Server::lastMessagesOf(int peer) {
  return std::make_unique<LastMessagesTask>(*this, peer);
}

void Server::forget(int source, uint64_t id, bool comes) {
  const std::optional<ArrivedRequest> dropped = unbegun_.forget(source, id, comes);
  if (dropped && source != members_.rank()) {
    exchange_.released(source, dropped->inbound.header.chargedBytes);
  }
}

void Server::serve(InboundMessage&& inbound) noexcept {
  const ReplyTo reply{inbound.source, inbound.header.callId};
  try {
    decodeAndRun(std::move(inbound), reply);
  } catch (const std::exception& error) { // there is not even memory to say so
    owe(reply, error);
    serving_.fetch_sub(1);
  }
}

void Server::serveOwn(uint64_t id, RpcMessage request, Streams streams) noexcept {
  const ReplyTo reply{members_.rank(), id};
  try {
    run(std::move(request), reply, std::move(streams));
  } catch (const std::exception&) {
    respond(reply, []() -> RpcMessage { throw; });
  }
}

void Server::decodeAndRun(InboundMessage&& inbound, ReplyTo reply) {
  exchange_.released(inbound.source, inbound.header.chargedBytes);
  MessageInStreams request;
  try {
    request = decodeMessage(std::move(inbound), deviceMaps_.devices());
    held_.arrived(reply.peer, *request.message);
  } catch (const BadMessage& error) {
    outbox_.refuse(reply.peer, error.what());
    serving_.fetch_sub(1);
    return;
  } catch (const std::exception& error) {
    respond(reply, [&] {
      return errorResponse(std::string("The request could not be read: ") + errorText(error), reply.id);
    });
    return;
  }
  run(std::move(request.message), reply, std::move(request.streams));
}

JitFuturePtr Server::process(rpc::Message& request, Streams streams) const {
  if (request.type() != rpc::MessageType::RUN_WITH_PROFILING_REQ) {
    return callback_(request, std::move(streams));
  }
  // torch records the remote events of a profiled call only the first time that a thread runs one (TensorPipe's
  // profiles miss them once each of its threads has had its turn): so each gets a new thread.
  JitFuturePtr future;
  std::exception_ptr error;
  startThread("a call that is profiled", [&] {
    threadHook_([&] {
      try {
        const c10::MultiStreamGuard guard(streams); // for torch passes none on to what it profiles
        future = callback_(request, std::move(streams));
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

void Server::run(RpcMessage request, ReplyTo reply, Streams streams) {
  FlightRecorder::instance().record(CallEvent::kStarted, reply.peer, reply.id, request->type());
  RunningRequests::Request running(*running_, reply.peer, reply.id);
  JitFuturePtr future;
  try {
    future = process(*request, std::move(streams));
  } catch (const std::exception& error) {
    respond(reply, [&] { return errorResponse(errorText(error), reply.id); });
    return;
  }
  if (future->completed()) {
    respondWith(reply, *future);
    return;
  }
  servingAsync_.fetch_add(1);
  struct Promised {
    Promised(std::shared_ptr<RunningRequests> list, const RunningRequests::Request& before)
        : all(std::move(list)),
          request(before) {}
    const std::shared_ptr<RunningRequests> all;
    RunningRequests::Request request;
  };
  auto promised = std::make_shared<Promised>(running_, running);
  // Run by whoever completes the future, a user's thread perhaps.
  future->addCallback(
      [this, owner = owner_, reply, promised = std::move(promised)](rpc::JitFuture& done) {
        const EngineWork work;
        promised->request.end();
        if (const auto alive = owner.lock()) {
          servingAsync_.fetch_sub(1);
          respondWith(reply, done);
        }
      },
      /*uses_future=*/false); // else torch takes streams for it, from the pool in which programs capture graphs
}

// A complete one, whose value is waited for by the streams of the response.
void Server::respondWith(ReplyTo reply, rpc::JitFuture& done) noexcept {
  if (deviceMaps_.devices() == nullptr) {
    respond(reply, [&] { return responseOf(done, reply.id); });
    return;
  }
  try {
    const c10::MultiStreamGuard guard(deviceMaps_.devices()->poolStreams());
    done.wait();
    respond(reply, [&] { return responseOf(done, reply.id); });
  } catch (const std::exception&) {
    respond(reply, []() -> RpcMessage { throw; });
  }
}

void Server::respond(ReplyTo reply, MakeResponse response) noexcept {
  FlightRecorder::instance().record(CallEvent::kFinished, reply.peer, reply.id);
  if (reply.peer == members_.rank()) {
    HeldByPeers::made({});
    respondToSelf(reply, response);
  } else {
    try {
      send(reply, response());
    } catch (const std::exception& error) {
      owe(reply, error);
    }
  }
  serving_.fetch_sub(1);
}

void Server::respondToSelf(ReplyTo reply, MakeResponse response) noexcept {
  try {
    if (deviceMaps_.devices() == nullptr) {
      selfCaller_->onOwnResponse(reply.id, response);
      return;
    }
    RpcMessage message = response();
    if (const auto onDevices = deviceMaps_.ofResponse(reply.peer, *message)) {
      selfCaller_->onOwnResponse(reply.id, std::move(message), *onDevices);
    } else {
      selfCaller_->onOwnResponse(reply.id, [&] { return message; });
    }
  } catch (const std::exception&) {
    selfCaller_->onOwnResponse(reply.id, []() -> RpcMessage { throw; });
  }
}

void Server::send(ReplyTo reply, RpcMessage response) {
  const auto make = [&](RpcMessage message) {
    auto onDevices = deviceMaps_.ofResponse(reply.peer, *message);
    auto out =
        outbox_.make(reply.peer, FrameKind::kResponse, reply.id, std::move(message), *this, std::move(onDevices));
    outbox_.encode(*out);
    return out;
  };
  held_.sends(reply.peer);
  std::unique_ptr<OutboundRpc> out;
  try {
    out = make(std::move(response));
  } catch (const std::exception& error) {
    out = make(errorResponse(std::string("The response could not be sent: ") + errorText(error), reply.id));
  }
  outbox_.submit(std::move(out), /*expectsReply=*/false);
}

// For want of memory the response could not be made. The token's holder tells the caller as soon as it can.
void Server::owe(ReplyTo reply, const std::exception& error) noexcept {
  try {
    LOG(ERROR) << "The response of " << members_.describe(members_.rank()) << " to " << members_.describe(reply.peer)
               << " could not be made: " << error.what();
  } catch (const std::bad_alloc&) {
  }
  owed_.add(reply);
}

void Server::pay(ProgressToken& token) {
  owed_.pay([&](ReplyTo reply) {
    RpcMessage response = errorResponse("The response could not be made: there was not enough memory", reply.id);
    exchange_.post(token, outbox_.make(reply.peer, FrameKind::kResponse, reply.id, std::move(response), *this));
  });
}

RpcMessage Server::errorResponse(const std::string& what, uint64_t id) const {
  const std::string text =
      c10::str("On ", members_.self(), " (rank ", members_.rank(), " on host ", members_.host(), "):\n", what);
  return rpc::createExceptionResponse(text, static_cast<int64_t>(id));
}

RpcMessage Server::responseOf(rpc::JitFuture& future, uint64_t id) const {
  if (future.hasError()) {
    return errorResponse(errorText(future.exception_ptr()), id);
  }
  RpcMessage response = future.value().toCustomClass<rpc::Message>();
  response->setId(static_cast<int64_t>(id));
  return response;
}

void Server::onSendFailed(FrameKind, int peer, uint64_t, const std::string& reason) noexcept {
  LOG(WARNING) << "RPC response to " << members_.describe(peer) << " was not sent: " << reason;
}

} // namespace torch_rpc_mpi
