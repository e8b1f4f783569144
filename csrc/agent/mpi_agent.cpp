#include "agent/mpi_agent.h"

#include "agent/rref_sessions.h"
#include "agent/tasks.h"
#include "host/fork_guard.h"
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
// Callers that are told of a lost response when there is memory again.
constexpr size_t kOwedErrors = 1024;

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
      members_(rank_, members),
      completion_(members_),
      exchange_(*transport_, *this, options_.exchange),
      engine_(options_.makeEngine(engineOptions(options_), static_cast<EngineDriver&>(*this), transport_->bell())),
      join_(rank_, transport_->size(), [this](ProgressToken& token, int peer, std::string body) {
        exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kDrain, std::move(body)));
      }) {
  owedErrors_.reserve(kOwedErrors);
  ReceivePool::instance().shareBetween(options_.ranksOnHost);
  watchForks();
}

MpiAgent::~MpiAgent() {
  if (!inForkedChild() && rpcAgentRunning_.load()) {
    try {
      shutdown();
    } catch (const std::exception& error) { // of a signal's handler
      LOG(WARNING) << "RPC on " << members_.describe(rank_) << " has ended, and meanwhile: " << error.what();
    }
  }
}

void MpiAgent::startImpl() {
  if (isCurrentRpcAgentSet() && getCurrentRpcAgent().get() == this) {
    adoptRRefContext(shared_from_this());
  }
  engine_->withToken([&](ProgressToken& token) { exchange_.start(token); });
  started_ = true; // also if the engine cannot: what was posted is taken back then
  engine_->start();
}

// ---- who is who ----

const rpc::WorkerInfo& MpiAgent::getWorkerInfo(const std::string& workerName) const {
  return members_.find(workerName);
}

const rpc::WorkerInfo& MpiAgent::getWorkerInfo(rpc::worker_id_t id) const {
  return members_.find(id);
}

std::vector<rpc::WorkerInfo> MpiAgent::getWorkerInfos() const {
  return members_.workers();
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

bool MpiAgent::postOutbox(ProgressToken& token) {
  if (!outboxFilled_.load()) {
    return false;
  }
  std::vector<OutboundPtr> queued;
  std::vector<std::pair<int, uint64_t>> owed;
  {
    const std::lock_guard<std::mutex> lock(outboxMutex_);
    queued.swap(outbox_);
    owed.assign(owedErrors_.begin(), owedErrors_.end());
    owedErrors_.clear(); // its capacity stays
    outboxFilled_ = false;
  }
  for (OutboundPtr& message : queued) {
    exchange_.post(token, std::move(message));
  }
  if (!owed.empty()) {
    payErrors(token, std::move(owed));
  }
  return !queued.empty();
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
  const bool posted = postOutbox(token);
  const bool moved = exchange_.poll(token);
  const auto now = Clock::now();
  exchange_.look(token, now);
  if (now >= nextTrim_) {
    nextTrim_ = now + kTrimAfter;
    ReceivePool::instance().trim(now - kTrimAfter);
  }
  if (now >= calls_.nextDeadline()) {
    expire(now);
  }
  join_.advance(
      token, [&] { return idle(token); },
      [this] { return DrainCounts{exchange_.counters().framesSent, exchange_.counters().framesReceived}; });
  if (!moved && now >= nextWatch_) {
    watchNeighbours(token, now);
  }
  // While it serves, a peer may wait for credit that only a later turn reports.
  rests_ = transport_->allRing() && idle(token);
  DoneMessages done = exchange_.takeDone(token);
  if (!done.sent.empty() || !done.failed.empty()) {
    arrivals_.push_back(std::make_unique<ReleaseTask>(std::move(done)));
  }
  return moved || posted;
}

void MpiAgent::watchNeighbours(ProgressToken& token, Clock::time_point now) {
  nextWatch_ = now + options_.watchInterval;
  {
    const std::lock_guard<std::mutex> lock(outboxMutex_);
    outboxFilled_ = outboxFilled_ || !owedErrors_.empty(); // for which there was no memory again
  }
  // What they sent before they ended, a goodbye perhaps, has had the time since the last look to arrive, and everything
  // that has arrived was read.
  for (const int peer : endedProcesses_) {
    exchange_.fail(token, peer, "its process has ended without leaving (it crashed or was killed)");
  }
  endedProcesses_ = transport_->takeEnded(token);
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
      onResponse(token, std::move(message));
      break;
    case FrameKind::kGoodbye: {
      const std::string farewell(message.body().data, message.body().bytes);
      exchange_.leaves(token, message.source, "it has left (" + farewell + ")", Clock::now());
      break;
    }
    case FrameKind::kDrain: {
      const std::string wrong = join_.onFrame(token, message.source, message.body());
      if (!wrong.empty()) {
        exchange_.fail(token, message.source, "it sent a frame that makes no sense: " + wrong);
      }
      break;
    }
    case FrameKind::kCredit:
      break;
  }
}

void MpiAgent::onResponse(ProgressToken& token, InboundMessage message) {
  const uint64_t id = message.header.callId;
  if (auto call = calls_.take(id, message.source)) {
    try {
      arrivals_.push_back(std::make_unique<ResponseTask>(*this, std::move(*call), std::move(message)));
    } catch (const std::bad_alloc&) {
      if (call->future != nullptr) { // it was not moved yet
        (void)failLater(std::move(*call), "There was no memory for the response");
      }
      throw;
    }
  } else if (calls_.awaitsOther(id, message.source)) {
    exchange_.fail(token, message.source, "it answered a call that was made to another worker");
  } // else it came too late
}

void MpiAgent::onStrayFrame(int source, const std::string& reason) {
  LOG(ERROR) << "RPC on " << members_.describe(rank_) << " dropped a frame from rank " << source << ": " << reason;
}

std::string MpiAgent::failureText(int peer, const std::string& cause) const {
  return c10::str("RPC to ", members_.describe(peer), " failed: ", cause, ". Calls to it can no longer be answered");
}

void MpiAgent::onPeerEnded(ProgressToken&, int peer, const std::string& reason) {
  members_.lose(peer, reason);
  for (PendingCall& call : calls_.takeAllOf(peer)) {
    if (!failLater(call, reason)) {
      call.failure = reason;
      arrivals_.push_back(std::make_unique<ErrorTask>(*this, std::move(call)));
    }
  }
  join_.fail(reason);
}

void MpiAgent::onBroken(const std::string& reason) noexcept {
  const std::string text = c10::str("RPC on ", members_.describe(rank_), " stopped: ", reason);
  LOG(ERROR) << text;
  {
    const std::lock_guard<std::mutex> lock(brokenMutex_);
    brokenReason_ = text;
  }
  members_.lose(rank_, text);
  std::vector<TaskPtr> failures;
  for (PendingCall& call : calls_.close()) {
    if (call.failure.empty()) {
      call.failure = text;
    }
    failures.push_back(std::make_unique<ErrorTask>(*this, std::move(call)));
  }
  engine_->post(failures);
  join_.fail(text);
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
      {"agent.client_active_calls", std::to_string(calls_.size())},
      {"agent.server_active_calls", std::to_string(serving_.load())},
      {"agent.server_active_async_calls", std::to_string(servingAsync_.load())},
      {"mpi.frames_sent", std::to_string(exchange.framesSent.load())},
      {"mpi.frames_received", std::to_string(exchange.framesReceived.load())},
      {"mpi.bytes_sent", std::to_string(exchange.bytesSent.load())},
      {"mpi.bytes_received", std::to_string(exchange.bytesReceived.load())},
      {"mpi.send_queue", std::to_string(exchange.waitingForCredit.load())},
      {"mpi.request_queue", std::to_string(engine.queuedRequests)},
      {"mpi.frames_dropped", std::to_string(exchange.framesDropped.load())},
      {"mpi.bulk_in_flight", std::to_string(exchange.partsOut.load() + exchange.partsIn.load())},
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
