#include "agent/mpi_agent.h"

#include "agent/fork_guard.h"
#include "agent/rref_sessions.h"
#include "agent/tasks.h"
#include "peer/receive_pool.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

EngineOptions engineOptions(const AgentOptions& options) {
  EngineOptions result;
  result.numWorkerThreads = options.numWorkerThreads;
  result.spinTime = options.spinTime;
  result.maxSleep = options.maxSleep;
  result.maxRest = options.maxRest;
  result.coresToSpare = options.coresToSpare;
  result.crowded = options.crowded;
  result.threadHook = options.threadHook;
  return result;
}

// Receive memory that was not used for so long goes back to the system.
constexpr auto kTrimAfter = std::chrono::seconds(5);

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
      rank_(transport_->rank()),
      exchange_(*transport_, *this, options_.exchange),
      engine_(std::make_shared<Engine>(engineOptions(options_), static_cast<EngineDriver&>(*this), transport_->bell())),
      drain_(rank_, transport_->size(), [this](ProgressToken& token, int peer, std::string body) {
        exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kDrain, std::move(body)));
      }) {
  workers_.reserve(members.size());
  for (size_t rank = 0; rank < members.size(); ++rank) {
    workers_.emplace_back(members[rank].name, static_cast<int64_t>(rank));
    hosts_.push_back(members[rank].host);
    idsByName_.emplace(members[rank].name, static_cast<int>(rank));
  }
  ReceivePool::instance().shareBetween(options_.ranksOnHost);
  watchForks();
}

MpiAgent::~MpiAgent() {
  if (!inForkedChild() && rpcAgentRunning_.load()) {
    try {
      shutdown();
    } catch (const std::exception& error) { // of a signal's handler
      LOG(WARNING) << "RPC on " << describe(rank_) << " has ended, and meanwhile: " << error.what();
    }
  }
}

void MpiAgent::startImpl() {
  if (isCurrentRpcAgentSet() && getCurrentRpcAgent().get() == this) {
    adoptRRefContext(shared_from_this());
  }
  engine_->withToken([&](ProgressToken& token) { exchange_.start(token); });
  engine_->start();
  started_ = true;
}

// ---- who is who ----

const rpc::WorkerInfo& MpiAgent::getWorkerInfo(const std::string& workerName) const {
  const auto found = idsByName_.find(workerName);
  TORCH_CHECK(
      found != idsByName_.end(), describe(rank_), " could not find destination ", workerName,
      ". The workers of this group are: ", [&] {
        std::string names;
        for (const WorkerInfo& worker : workers_) {
          names += (names.empty() ? "" : ", ") + worker.name_;
        }
        return names;
      }());
  return workers_[found->second];
}

const rpc::WorkerInfo& MpiAgent::getWorkerInfo(rpc::worker_id_t id) const {
  TORCH_CHECK(
      id >= 0 && static_cast<size_t>(id) < workers_.size(), describe(rank_), " could not find destination ", id,
      ". The workers of this group have the ids 0 to ", workers_.size() - 1);
  return workers_[id];
}

std::vector<rpc::WorkerInfo> MpiAgent::getWorkerInfos() const {
  return workers_;
}

std::string MpiAgent::describe(int rank) const {
  return c10::str("worker '", workers_[rank].name_, "' (rank ", rank, " on host ", hosts_[rank], ")");
}

// ---- progress ----

void MpiAgent::submit(OutboundPtr message, bool expectsReply) {
  {
    const std::lock_guard<std::mutex> lock(outboxMutex_);
    outbox_.push_back(std::move(message));
    outboxFilled_ = true;
  }
  engine_->submitted(expectsReply);
}

bool MpiAgent::hasQueued() const {
  return outboxFilled_.load() || exchange_.hasDue();
}

Clock::time_point MpiAgent::nextDeadline() const {
  return calls_.nextDeadline();
}

bool MpiAgent::awaitsAnswers() const {
  return calls_.size() > 0;
}

bool MpiAgent::rests() const {
  return rests_.load();
}

bool MpiAgent::turn(ProgressToken& token, std::vector<TaskPtr>& tasks) {
  const auto handOver = [&] {
    std::move(arrivals_.begin(), arrivals_.end(), std::back_inserter(tasks));
    arrivals_.clear();
  };
  bool active = false;
  try {
    active = progress(token);
  } catch (...) {
    handOver(); // the calls that they complete are in no table any more, and there will be no other turn
    throw;
  }
  handOver();
  return active;
}

bool MpiAgent::progress(ProgressToken& token) {
  std::vector<OutboundPtr> queued;
  if (outboxFilled_.load()) {
    const std::lock_guard<std::mutex> lock(outboxMutex_);
    queued.swap(outbox_);
    outboxFilled_ = false;
  }
  for (OutboundPtr& message : queued) {
    exchange_.post(token, std::move(message));
  }
  const bool moved = exchange_.poll(token);
  const auto now = Clock::now();
  exchange_.reportStaleCredits(token, now);
  if (now >= nextTrim_) {
    nextTrim_ = now + kTrimAfter;
    ReceivePool::instance().trim(now - kTrimAfter);
  }
  if (now >= calls_.nextDeadline()) {
    expire(now);
  }
  advanceDrain(token);
  if (!moved && now >= nextWatch_) {
    watchNeighbours(token, now);
  }
  // While it serves, a peer may wait for credit that only a later turn reports.
  rests_ = transport_->allRing() && idle(token);
  auto finished = exchange_.takeFinished(token);
  auto failed = exchange_.takeFailed(token);
  if (!finished.empty() || !failed.empty()) {
    arrivals_.push_back(std::make_unique<ReleaseTask>(std::move(finished), std::move(failed)));
  }
  return moved || !queued.empty();
}

void MpiAgent::watchNeighbours(ProgressToken& token, Clock::time_point now) {
  nextWatch_ = now + options_.watchInterval;
  // What they sent before they ended, a goodbye perhaps, has had the time since the last look to arrive, and everything
  // that has arrived was read.
  for (const int peer : ended_) {
    onPeerGone(
        token, peer,
        c10::str(
            "RPC to ", describe(peer),
            " failed: its process has ended without leaving (it crashed or was killed). "
            "Calls to it can no longer be answered"));
  }
  ended_ = transport_->takeEnded(token);
}

std::unique_ptr<BulkTarget> MpiAgent::makeTarget(int, const FrameHeader&, ConstSpan body) {
  return makeReceiveTarget(body);
}

void MpiAgent::onMessage(ProgressToken& token, InboundMessage message) {
  const FrameHeader& header = message.header;
  switch (header.kind) {
    case FrameKind::kRequest:
      serving_.fetch_add(1);
      arrivals_.push_back(std::make_unique<RequestTask>(*this, std::move(message)));
      break;
    case FrameKind::kResponse:
      if (auto call = calls_.take(header.callId)) { // else it timed out
        arrivals_.push_back(std::make_unique<ResponseTask>(*this, std::move(*call), std::move(message)));
      }
      break;
    case FrameKind::kGoodbye:
      onPeerGone(
          token, message.source,
          c10::str(
              "RPC to ", describe(message.source), " failed: it has left (",
              std::string(message.body().data, message.body().bytes), "). Calls to it can no longer be answered"));
      break;
    case FrameKind::kDrain:
      drain_.onFrame(token, message.source, message.body());
      break;
    case FrameKind::kCredit:
      break;
  }
}

void MpiAgent::onBadFrame(int source, const std::string& reason) {
  LOG(ERROR) << "RPC on " << describe(rank_) << " dropped a bad frame from "
             << (source >= 0 && source < transport_->size() ? describe(source) : "an unknown rank") << ": " << reason;
}

void MpiAgent::onPeerGone(ProgressToken& token, int peer, const std::string& reason) {
  {
    const std::lock_guard<std::mutex> lock(goneMutex_);
    if (!gone_.emplace(peer, reason).second) {
      return;
    }
    goneCount_.fetch_add(1);
  }
  exchange_.dropPeer(token, peer, reason);
  for (PendingCall& call : calls_.takeAllOf(peer)) {
    arrivals_.push_back(std::make_unique<ErrorTask>(*this, std::move(call), reason));
  }
  if (joining_) {
    joinFailed(reason);
  }
}

void MpiAgent::onBroken(const std::string& reason) noexcept {
  const std::string text = c10::str("RPC on ", describe(rank_), " stopped: ", reason);
  LOG(ERROR) << text;
  failAllCalls(text);
  joinFailed(text);
}

void MpiAgent::failAllCalls(const std::string& reason) {
  for (const PendingCall& call : calls_.close()) {
    CompletionTask::fail(call, reason);
  }
}

// ---- metrics ----

void MpiAgent::addGilWaitTime(const std::chrono::microseconds gilWaitTime) {
  const std::lock_guard<std::mutex> lock(metricsMutex_);
  ++gilWaits_;
  gilWaitMicroseconds_ += static_cast<uint64_t>(gilWaitTime.count());
}

std::unordered_map<std::string, std::string> MpiAgent::getMetrics() {
  const EngineCounts engine = engine_->counts();
  const ExchangeCounts exchange = exchange_.counts();
  std::unordered_map<std::string, std::string> metrics{
      {"agent.thread_pool_size", std::to_string(options_.numWorkerThreads)},
      {"agent.num_idle_threads", std::to_string(std::max(options_.numWorkerThreads - engine.runningRequests, 0))},
      {"agent.client_active_calls", std::to_string(calls_.size())},
      {"agent.server_active_calls", std::to_string(serving_.load())},
      {"agent.server_active_async_calls", std::to_string(servingAsync_.load())},
      {"mpi.frames_sent", std::to_string(exchange.framesSent)},
      {"mpi.frames_received", std::to_string(exchange.framesReceived)},
      {"mpi.bytes_sent", std::to_string(exchange.bytesSent)},
      {"mpi.bytes_received", std::to_string(exchange.bytesReceived)},
      {"mpi.send_queue", std::to_string(exchange.waitingForCredit)},
      {"mpi.request_queue", std::to_string(engine.queuedRequests)},
      {"mpi.bulk_in_flight", std::to_string(exchange.bulkInFlight)},
      {"mpi.pending_calls", std::to_string(calls_.size())},
      {"mpi.engine_threads", std::to_string(engine.threads)},
      {"mpi.receive_pool_bytes", std::to_string(ReceivePool::instance().cachedBytes())}};
  if (isGILProfilingEnabled()) {
    const std::lock_guard<std::mutex> lock(metricsMutex_);
    const double average =
        gilWaits_ == 0 ? 0 : static_cast<double>(gilWaitMicroseconds_) / static_cast<double>(gilWaits_);
    metrics["agent.gil_average_wait_time_us"] = std::to_string(average);
  }
  return metrics;
}

} // namespace torch_rpc_mpi
