#include "agent/mpi_agent.h"

#include <cmath>

#include <unistd.h>

#include "agent/flight_text.h"
#include "agent/leaving.h"
#include "agent/rref_sessions.h"
#include "base/deadline.h"
#include "host/fork_guard.h"
#include "peer/outbound_control.h"
#include "peer/receive_pool.h"
#include "torch_compat/rref_timeout.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

EngineOptions engineOptions(const AgentOptions& options) {
  EngineOptions result;
  result.numWorkerThreads = options.numWorkerThreads;
  result.idling = options.idling;
  result.coresToSpare = options.coresToSpare;
  result.threadHook = options.threadHook;
  return result;
}

// Agents some of whose threads outlive them.
void keepForEver(std::shared_ptr<MpiAgent> agent) {
  static std::mutex mutex;
  static auto* agents = new std::vector<std::shared_ptr<MpiAgent>>();
  const std::lock_guard<std::mutex> lock(mutex);
  agents->push_back(std::move(agent));
}

} // namespace

MpiAgent::MpiAgent(
    std::unique_ptr<Transport> transport,
    std::vector<GroupMember> members,
    std::unique_ptr<rpc::RequestCallback> callback,
    AgentOptions options)
    : RpcAgent(
          WorkerInfo(members.at(transport->rank()).name, static_cast<int64_t>(transport->rank())),
          std::move(callback),
          options.rpcTimeout),
      options_(std::move(options)),
      transport_(std::move(transport)),
      members_(transport_->rank(), members),
      deviceMaps_(members_, options_.devices, options_.deviceMaps),
      flightLog_(
          options_.flightRecorderDir,
          c10::str("torch_rpc_mpi-rank", members_.rank(), "-", getpid()),
          [this](int peer) { return members_.describe(peer); },
          [this](const std::string& why) { return flightText(why, members_, caller_, server_, getMetrics()); }),
      completion_(members_),
      dispatcher_(
          *transport_,
          members_,
          exchange_,
          outbox_,
          server_,
          caller_,
          join_,
          flightLog_,
          options_.onWorkerLost,
          options_.watchInterval,
          options_.devices),
      exchange_(*transport_, dispatcher_, options_.exchange),
      outbox_(exchange_, engine_, options_.exchange.eagerLimit),
      server_(members_, exchange_, outbox_, engine_, *cb_, options_.numWorkerThreads, options_.threadHook, deviceMaps_),
      caller_(
          members_,
          completion_,
          exchange_,
          outbox_,
          server_,
          engine_,
          flightLog_,
          options_.signals,
          options_.slotUsesBefore,
          options_.devices,
          options_.onLateResponse),
      join_(
          members_.rank(),
          transport_->size(),
          [this](ProgressToken& token, int peer, std::string body) {
            exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kDrain, std::move(body)));
          }),
      engine_(options_.makeEngine(engineOptions(options_), dispatcher_, transport_->bell())) {
  ReceivePool::instance().shareBetween(options_.ranksOnHost);
  watchForks();
}

MpiAgent::~MpiAgent() {
  if (!inForkedChild() && rpcAgentRunning_.load()) {
    try {
      shutdown();
    } catch (const std::exception& error) { // of a signal's handler
      LOG(WARNING) << "RPC on " << members_.describe(members_.rank()) << " has ended, and meanwhile: " << error.what();
    }
  }
}

void MpiAgent::startImpl() {
  if (isCurrentRpcAgentSet() && getCurrentRpcAgent().get() == this) {
    adoptRRefContext(shared_from_this());
    torch_compat::tameTimeoutHandler();
  }
  server_.start(weak_from_this(), caller_.ownCalls());
  engine_->withToken([&](ProgressToken& token) { exchange_.start(token); });
  started_ = true; // also if the engine cannot: what was posted is taken back then
  engine_->start();
}

// ---- calls ----

std::chrono::milliseconds MpiAgent::timeoutOf(float seconds) const {
  const double limit =
      seconds == rpc::kUnsetRpcTimeout ? std::chrono::duration<double>(getRpcTimeout()).count() : double{seconds};
  TORCH_CHECK(limit >= 0, "An RPC timeout must not be negative, but is ", limit, " s. Give seconds, or 0 for no limit");
  if (limit == 0 || limit > kLongestWait) {
    return std::chrono::milliseconds(0);
  }
  // At least 1 ms: the smallest timeout that a user can give is not "none".
  return std::chrono::milliseconds(std::max<int64_t>(std::llround(limit * rpc::kSecToMsConversion), 1));
}

void MpiAgent::checkNotForked() const {
  TORCH_CHECK(
      !inForkedChild(),
      "RPC cannot be used in a child process made by fork(): RPC was initialized in its parent, and its threads and "
      "its MPI stay there. Start such processes with the 'spawn' or 'forkserver' method, or do not call RPC in them "
      "(for a DataLoader: multiprocessing_context='forkserver')");
}

std::string MpiAgent::notRunningText(rpc::MessageType type) const {
  if (const auto broken = members_.whyLost(members_.rank())) {
    return *broken;
  }
  return c10::str(
      "Node ", members_.rank(), " tried to send() a message of type ", type,
      " but RPC is no longer running on this node.");
}

JitFuturePtr MpiAgent::send(
    const WorkerInfo& to,
    RpcMessage message,
    const float rpcTimeoutSeconds,
    const rpc::DeviceMap& deviceMap) {
  TORCH_CHECK(message->isRequest(), "MpiAgent::send(..) is only for sending requests.");
  checkNotForked();
  const rpc::MessageType type = message->type();
  TORCH_CHECK(rpcAgentRunning_.load(), notRunningText(type));
  const int peer = getWorkerInfo(to.id_).id_;
  const auto timeout = timeoutOf(rpcTimeoutSeconds);
  auto onDevices = deviceMaps_.ofRequest(peer, *message, deviceMap);
  JitFuturePtr future = options_.faults == nullptr
      ? caller_.call(peer, std::move(message), timeout, std::move(onDevices))
      : sendWithFaults(peer, std::move(message), timeout, std::move(onDevices));
  TORCH_CHECK(future != nullptr, notRunningText(type));
  return future;
}

JitFuturePtr MpiAgent::sendWithFaults(
    int peer,
    RpcMessage message,
    std::chrono::milliseconds timeout,
    std::shared_ptr<OutboundSlices> onDevices) {
  const rpc::MessageType type = message->type();
  const auto failure = options_.faults->failureOf(*message);
  if (!failure) {
    const auto delay = options_.faults->delayOf(type);
    Caller::Later later;
    if (delay.count() > 0) {
      later = [this, delay](std::function<void()> send) { options_.faults->runLater(delay, std::move(send)); };
    }
    return caller_.call(peer, std::move(message), timeout, std::move(onDevices), later);
  }
  if (Faults::torchRetries(type)) { // and its thread that does so must not meet a future that has failed
    return caller_.failingCall(peer, type, *failure);
  }
  caller_.expectAnswer(false); // there will be none
  auto future = c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get());
  future->setError(std::make_exception_ptr(std::runtime_error(*failure)));
  return future;
}

// ---- leaving ----

void MpiAgent::join(bool shutdown, float timeout) {
  checkNotForked();
  TORCH_CHECK(timeout >= 0, "The timeout of join must not be negative, but is ", timeout);
  const auto result = join_.wait(options_.signals, timeout, shutdown, [this] { engine_->wake(); });
  TORCH_CHECK(
      result != Join::Result::kFailed, "A graceful shutdown of RPC is not possible: ", join_.failure(),
      ". RPC ends here without the others; rpc.shutdown(graceful=False) in its place waits for nobody");
  TORCH_CHECK(
      result == Join::Result::kAgreed, "The graceful shutdown of RPC timed out after ", timeout,
      " s: ", whatJoinWaitsFor());
  agreed_ = shutdown;
}

std::string MpiAgent::whatJoinWaitsFor() const {
  std::string own;
  for (int peer = 0; peer < transport_->size(); ++peer) {
    if (const size_t pending = caller_.unansweredBy(peer)) {
      own += c10::str(own.empty() ? "" : ", ", pending, " to ", members_.describe(peer));
    }
  }
  if (!own.empty()) {
    return "calls of this worker are unanswered: " + own;
  }
  if (const int64_t serving = server_.serving()) {
    return c10::str("this worker is still serving ", serving, " calls");
  }
  if (const int64_t completing = caller_.completing()) {
    return c10::str("callbacks of ", completing, " calls of this worker are still running");
  }
  return "this worker is idle, but another one has not called shutdown or is still busy";
}

void MpiAgent::shutdownImpl() {
  if (inForkedChild() || !started_.exchange(false)) {
    return;
  }
  if (options_.faults != nullptr) {
    options_.faults->awaitDelayed(); // those use this object
  }
  Leaving leaving(*engine_, dispatcher_, exchange_, caller_, members_, options_.signals);
  flightLog_.write(); // of what went wrong last; its task may not run any more
  const bool stopped = leaving.leave(agreed_, farewell_);
  if (watch_ != nullptr && (agreed_ || farewell_)) { // else its peers are to find out
    watch_->leave();
  }
  ReceivePool::instance().trim(Clock::time_point::max());
  if (!stopped) {
    LOG(WARNING) << "RPC on " << members_.describe(members_.rank()) << " was shut down while " << engine_->counts().busy
                 << " functions called through it were still running";
    if (auto self = weak_from_this().lock()) {
      keepForEver(std::move(self));
    } else {
      (void)engine_->stop(std::chrono::hours(24 * 365)); // in the destructor: they still use this object
    }
  }
  if (stopped && options_.devices != nullptr) {
    try {
      options_.devices->close();
    } catch (const std::exception& error) {
      LOG(WARNING) << "RPC on " << members_.describe(members_.rank())
                   << " could not give back all memory of its devices: " << error.what();
    }
  }
  if (leaving.interrupted() != nullptr) {
    std::rethrow_exception(leaving.interrupted());
  }
}

void MpiAgent::leave(std::optional<std::string> farewell) {
  farewell_ = std::move(farewell);
  silenceRRefs();
  shutdown();
}

// ---- workers ----

rpc::DeviceMap MpiAgent::getDeviceMap(const WorkerInfo& dst) const {
  return deviceMaps_.of(getWorkerInfo(dst.id_).id_);
}

const std::vector<c10::Device>& MpiAgent::getDevices() const {
  return options_.devices == nullptr ? RpcAgent::getDevices() : options_.devices->all();
}

const rpc::WorkerInfo& MpiAgent::getWorkerInfo(const std::string& workerName) const {
  return members_.find(workerName);
}

const rpc::WorkerInfo& MpiAgent::getWorkerInfo(rpc::worker_id_t id) const {
  return members_.find(id);
}

std::vector<rpc::WorkerInfo> MpiAgent::getWorkerInfos() const {
  return members_.workers();
}

// ---- metrics ----

void MpiAgent::addGilWaitTime(const std::chrono::microseconds gilWaitTime) {
  const std::lock_guard<std::mutex> lock(metricsMutex_);
  ++gilWaits_;
  gilWaitMicroseconds_ += static_cast<uint64_t>(gilWaitTime.count());
}

std::unordered_map<std::string, std::string> MpiAgent::getMetrics() {
  const EngineCounts engine = engine_->counts();
  const ExchangeCounters& exchange = exchange_.counters();
  std::unordered_map<std::string, std::string> metrics{
      {"agent.thread_pool_size", std::to_string(options_.numWorkerThreads)},
      {"agent.num_idle_threads", std::to_string(std::max(options_.numWorkerThreads - engine.runningRequests, 0))},
      {"agent.client_active_calls", std::to_string(caller_.unanswered())},
      {"agent.server_active_calls", std::to_string(server_.serving())},
      {"agent.server_active_async_calls", std::to_string(server_.servingAsync())},
      {"mpi.frames_sent", std::to_string(exchange.framesSent.load())},
      {"mpi.frames_received", std::to_string(exchange.framesReceived.load())},
      {"mpi.bytes_sent", std::to_string(exchange.bytesSent.load())},
      {"mpi.bytes_received", std::to_string(exchange.bytesReceived.load())},
      {"mpi.send_queue", std::to_string(exchange.waitingForCredit.load() + exchange.waitingUntaken.load())},
      {"mpi.request_queue", std::to_string(engine.queuedRequests)},
      {"mpi.frames_dropped", std::to_string(exchange.framesDropped.load())},
      {"mpi.bulk_in_flight", std::to_string(exchange.partsOut.load() + exchange.partsIn.load())},
      {"mpi.pending_calls", std::to_string(caller_.unanswered())},
      {"mpi.engine_threads", std::to_string(engine.threads)},
      {"mpi.receive_pool_bytes", std::to_string(ReceivePool::instance().cachedBytes())}};
  if (isGILProfilingEnabled()) {
    const std::lock_guard<std::mutex> lock(metricsMutex_);
    const double average =
        gilWaits_ == 0 ? 0 : static_cast<double>(gilWaitMicroseconds_) / static_cast<double>(gilWaits_);
    metrics["agent.gil_average_wait_time_us"] = std::to_string(average);
  }
  if (options_.devices != nullptr) {
    const DeviceCounters& counters = options_.devices->counters;
    metrics["mpi.device_bytes_sent_pinned"] = std::to_string(counters.sentPinned.load());
    metrics["mpi.device_bytes_received_pinned"] = std::to_string(counters.receivedPinned.load());
    metrics["mpi.device_bytes_sent_ipc"] = std::to_string(counters.sentIpc.load());
    metrics["mpi.device_bytes_received_ipc"] = std::to_string(counters.receivedIpc.load());
    metrics["mpi.device_bytes_sent_mpi"] = std::to_string(counters.sentMpi.load());
    metrics["mpi.device_bytes_received_mpi"] = std::to_string(counters.receivedMpi.load());
    metrics["mpi.device_path"] = options_.devices->wayOfMpi();
    if (const Lender* lender = options_.devices->lender()) {
      for (const auto& [peer, ways] : lender->ways(options_.devices->wayOfMpi())) {
        metrics["mpi.device_path." + members_.find(static_cast<rpc::worker_id_t>(peer)).name_] = ways;
      }
    }
    metrics["mpi.pinned_bytes"] = std::to_string(options_.devices->pinnedBytes());
  }
  return metrics;
}

} // namespace torch_rpc_mpi
