// Any bytes as what other ranks send to one agent: frames, chunks, answers to its calls, drain frames, goodbyes.
//
// The agent is rank 1 of 4, which has a parent (0) and a child (3) in the tree of a graceful shutdown, and one rank (2)
// that is neither. Whatever it gets, it goes on, and nobody is lost but those that sent nonsense, each by name. It may
// have devices, which its neighbours share.
#include <array>
#include <cstring>

#include "agent/loss_news.h"
#include "agent/mpi_agent.h"
#include "check.h"
#include "host_device.h"
#include "peer/receive_pool.h"
#include "sim_engine.h"
#include "wire.h"

using namespace torch_rpc_mpi;
namespace rpc = torch::distributed::rpc;

namespace {

constexpr int kSelf = 1, kSize = 4;
constexpr size_t kEagerLimit = 128, kChunk = 64;

// The input, as it is used up. At its end it gives zeros.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const {
    return left_ == 0;
  }
  uint8_t byte() {
    if (left_ == 0) {
      return 0;
    }
    --left_;
    return *data_++;
  }
  std::string bytes(size_t count) {
    const size_t taken = std::min(count, left_);
    std::string result(reinterpret_cast<const char*>(data_), taken);
    data_ += taken;
    left_ -= taken;
    return result;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// Reads all of a request and answers with it.
class Echo final : public rpc::RequestCallback {
 protected:
  JitFuturePtr processMessage(rpc::Message& request, std::vector<c10::Stream>) const override {
    for (const at::Tensor& tensor : request.tensors()) {
      fuzz::readAll(tensor);
    }
    auto future = c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get());
    future->markCompleted(
        at::IValue(
            c10::make_intrusive<rpc::Message>(
                std::vector<char>(request.payload()), std::vector<at::Tensor>(request.tensors()),
                rpc::MessageType::SCRIPT_RET)));
    return future;
  }
};

class Run {
 public:
  explicit Run(Input input) : input_(input) {
    Clock::simulate(&wire_.time);
    const uint8_t settings = input_.byte();
    AgentOptions options;
    options.exchange.eagerLimit = kEagerLimit;
    options.exchange.bulkChunk = kChunk;
    options.signals = {[] { return inJoin != nullptr; }, [] { inJoin->serve(); }};
    options.makeEngine = [&](const EngineOptions&, EngineDriver& driver, BellWord&) {
      auto engine = std::make_shared<simulation::SimEngine>(kSelf, driver, random_, [] {});
      engine_ = engine.get();
      return engine;
    };
    std::vector<GroupMember> members;
    for (int rank = 0; rank < kSize; ++rank) {
      members.push_back({"worker" + std::to_string(rank), "host"});
    }
    if ((settings & 4) != 0) {
      options.devices = fuzz::makeDevices(kSize);
      const c10::Device first = options.devices->all().front();
      const rpc::DeviceMap map{{first, first}};
      options.deviceMaps.assign(kSize, {map, map});
    }
    hasDevices_ = options.devices != nullptr;
    agent_ = std::make_shared<MpiAgent>(
        std::make_unique<fuzz::WireTransport>(wire_, kSelf, kSize, (settings & 1) != 0), std::move(members),
        std::make_unique<Echo>(), options);
    agent_->start();
    joins_ = (settings & 2) != 0;
  }
  ~Run() {
    calls_.clear();
    agent_.reset();
    CHECK_EQUAL(fuzz::deviceAllocations(), 0U);
    ReceivePool::instance().trim(Clock::time_point::max());
    Clock::simulate(nullptr);
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void run() {
    if (joins_) {
      joinMeanwhile();
    }
    while (!input_.empty()) {
      step();
    }
    settle();
    check();
    agent_->shutdown();
    for (const JitFuturePtr& future : calls_) {
      check::that(future->completed(), "each call completes", __FILE__, __LINE__);
    }
  }

 private:
  // Of a wait for the others: the rest of the input comes meanwhile, then it is interrupted.
  void joinMeanwhile() {
    inJoin = this;
    try {
      agent_->join(true, 0);
    } catch (const std::exception&) { // somebody has left, or the end of the input
    }
    inJoin = nullptr;
  }
  void serve() {
    if (input_.empty()) {
      throw std::runtime_error("interrupted");
    }
    step();
    settle();
  }

  void step() {
    const uint8_t choice = input_.byte();
    const int peer = std::array{0, 2, 3, 0}[choice & 3];
    switch ((choice >> 2) & 7) {
      case 0: // anything
        sendFrame(peer, input_.bytes(input_.byte()));
        break;
      case 1:
      case 2:
        sendFrame(peer, frameOf(peer));
        break;
      case 3: // of any length
        sendChunk(peer, input_.bytes(input_.byte()));
        break;
      case 4: // of the length that is expected
        if (!wire_.expected[peer].empty()) {
          std::string chunk = input_.bytes(input_.byte());
          chunk.resize(wire_.expected[peer].front());
          sendChunk(peer, std::move(chunk));
        }
        break;
      case 5:
        call(peer);
        break;
      case 6: // calls become late, and time out
        wire_.time += Clock::duration(std::chrono::milliseconds(250)).count() * input_.byte();
        settle();
        break;
      default:
        settle();
    }
  }

  void sendFrame(int peer, std::string frame) {
    sent_[peer] = true;
    nonsense_[peer] = nonsense_[peer] || !makesSense(frame);
    noteNews(frame);
    wire_.frames.emplace_back(peer, std::move(frame));
  }
  // Whom a frame, or one in a batch, says to be lost: that one is, though it has sent nothing.
  void noteNews(const std::string& frame) {
    const auto header = parseFrame(frame.data(), frame.size());
    if (!header) {
      return;
    }
    const ConstSpan body{frame.data() + sizeof(FrameHeader), header->bodyBytes};
    if (header->kind == FrameKind::kLost) {
      noteLoss(body);
    }
    ConstSpan rest = header->kind == FrameKind::kBatch ? body : ConstSpan{};
    while (rest.bytes > 0) {
      const auto next = parseFrameOfBatch(rest);
      if (!next) {
        return;
      }
      if (next->kind == FrameKind::kLost) {
        noteLoss({rest.data + sizeof(FrameHeader), next->bodyBytes});
      }
      const size_t bytes = sizeof(FrameHeader) + next->bodyBytes;
      rest = {rest.data + bytes, rest.bytes - bytes};
    }
  }
  void noteLoss(ConstSpan body) {
    try {
      const int rank = readLossNews(body, kSize).rank;
      if (rank == kSelf) { // given up by all
        sent_.fill(true);
      } else {
        sent_[rank] = true;
      }
    } catch (const std::runtime_error&) { // which fails its sender
    }
  }
  static bool makesSense(const std::string& frame) {
    const auto header = parseFrame(frame.data(), frame.size());
    ConstSpan rest{frame.data() + sizeof(FrameHeader), 0};
    if (header && header->kind == FrameKind::kBatch) {
      rest.bytes = header->bodyBytes;
    }
    while (rest.bytes > 0) {
      const auto next = parseFrameOfBatch(rest);
      if (!next) {
        return false;
      }
      const size_t bytes = sizeof(FrameHeader) + next->bodyBytes;
      rest = {rest.data + bytes, rest.bytes - bytes};
    }
    return header.has_value();
  }
  void sendChunk(int peer, std::string chunk) {
    sent_[peer] = true;
    wire_.chunks[peer].push_back(std::move(chunk));
  }

  // One that is well-formed as a frame; what is in it, the input says.
  std::string frameOf(int peer, bool inBatch = false) {
    constexpr auto kKinds = static_cast<unsigned>(FrameKind::kReturn);
    const uint8_t choice = input_.byte();
    FrameHeader header;
    header.kind = static_cast<FrameKind>(1 + input_.byte() % kKinds);
    std::string body;
    if (header.kind == FrameKind::kBatch && !inBatch && (choice & 1U) != 0) {
      for (unsigned left = input_.byte() % 4; left > 0; --left) {
        body += frameOf(peer, /*inBatch=*/true);
      }
    } else if (header.kind == FrameKind::kInquiry && (choice & 1U) != 0) {
      body.assign(reinterpret_cast<const char*>(&lastId_), sizeof(lastId_));
    } else {
      body = input_.bytes(input_.byte());
    }
    if (header.kind == FrameKind::kVerdict && (choice & 1U) != 0) { // longer than the input can say
      body.resize(sizeof(LendingVerdict));
    }
    header.messageType = choice >> 3;
    header.tickets = carries(header) && (choice & 4U) != 0 ? input_.byte() % 3 : 0;
    header.callId = (choice & 8U) != 0 ? lastId_ : input_.byte();
    header.bulkParts = carries(header) && (choice & 16U) != 0 ? input_.byte() % 3 : 0;
    header.bodyBytes = body.size();
    if (carries(header) && (choice & 32U) != 0) { // the body is the first part
      header.bodyInBulk = 1;
      sendChunk(peer, body);
      body.clear();
    }
    header.releasedRequests = (choice & 64U) != 0 ? input_.byte() : 0;
    header.chargedBytes = (choice & 128U) != 0 ? input_.byte() : 0;
    std::string frame(reinterpret_cast<const char*>(&header), sizeof(header));
    return frame + body;
  }

  static bool carries(const FrameHeader& header) {
    return header.kind <= FrameKind::kResponse;
  }

  void call(int peer) {
    const uint8_t choice = input_.byte();
    const std::string text = input_.bytes(choice % 8);
    std::vector<at::Tensor> tensors;
    for (unsigned left = hasDevices_ ? choice >> 6 : 0; left > 0; --left) {
      tensors.push_back(fuzz::deviceTensor(0, size_t{1} << (input_.byte() % 24)));
    }
    auto message = c10::make_intrusive<rpc::Message>(
        std::vector<char>(text.begin(), text.end()), std::move(tensors), rpc::MessageType::SCRIPT_CALL);
    const auto request = message; // send() gives it its id
    calls_.push_back(agent_->send(agent_->getWorkerInfo(static_cast<rpc::worker_id_t>(peer)), std::move(message), 30));
    lastId_ = static_cast<uint64_t>(request->id());
  }

  void settle() {
    for (int idle = 0; idle < (hasDevices_ ? 10 : 3); ++idle) { // a device is done when it is asked again
      bool active = engine_->turn();
      while (engine_->hasTasks()) {
        engine_->runTask();
        active = true;
      }
      idle = active ? 0 : idle;
    }
  }

  void check() const {
    check::that(!engine_->broken(), "the agent goes on", __FILE__, __LINE__);
    std::array<bool, kSize> lost{};
    for (const Membership::Loss& loss : agent_->lostWorkers()) {
      const std::string name = "worker" + std::to_string(loss.rank);
      check::that(loss.reason.find(name) != std::string::npos, "the reason names who was lost", __FILE__, __LINE__);
      lost.at(loss.rank) = true;
    }
    for (int rank = 0; rank < kSize; ++rank) {
      check::that(sent_[rank] || !lost[rank], "nobody is lost for what another one sent", __FILE__, __LINE__);
      check::that(!nonsense_[rank] || lost[rank], "who sends nonsense is lost", __FILE__, __LINE__);
    }
  }

  Input input_;
  fuzz::Wire wire_;
  simulation::Random random_{1};
  simulation::SimEngine* engine_ = nullptr;
  std::shared_ptr<MpiAgent> agent_;
  bool joins_ = false, hasDevices_ = false;
  uint64_t lastId_ = 0;
  std::vector<JitFuturePtr> calls_;
  std::array<bool, kSize> sent_{}, nonsense_{};
  static inline Run* inJoin = nullptr;
};

} // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  c10::initLogging();                                      // as loud as the environment says: an agent logs who is lost
  c10::SetStackTraceFetcher([] { return std::string(); }); // which would take most of the time
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Run(Input(data, size)).run();
  return 0;
}
