// Whole agents, several in one process, over the fake network.
#include "agent/loss_news.h"
#include "agent/mpi_agent.h"

#include <future>
#include <map>
#include <thread>

#include <ATen/Functions.h>

#include "allocations.h"
#include "check.h"
#include "fake_transport.h"

using namespace torch_rpc_mpi;
using torch_rpc_mpi::testing::FakeNetwork;
using torch_rpc_mpi::testing::FakeTransport;
namespace rpc = torch::distributed::rpc;

namespace {

// Answers with what it was sent; the payload chooses how.
class EchoCallback final : public rpc::RequestCallback {
 public:
  mutable std::vector<JitFuturePtr> held;
  mutable std::mutex mutex;
  std::map<std::string, std::function<void()>> runs; // by text, before it answers
  int count(const std::string& text) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return counts_[text];
  }

 protected:
  JitFuturePtr processMessage(rpc::Message& request, std::vector<c10::Stream>) const override {
    const std::string text(request.payload().begin(), request.payload().end());
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ++counts_[text];
    }
    if (const auto run = runs.find(text); run != runs.end()) {
      run->second();
    }
    if (text == "throw") {
      throw std::runtime_error("the function failed");
    }
    auto future = c10::make_intrusive<rpc::JitFuture>(at::AnyClassType::get());
    if (text == "hold") {
      const std::lock_guard<std::mutex> lock(mutex);
      held.push_back(future);
      return future;
    }
    future->markCompleted(
        at::IValue(
            c10::make_intrusive<rpc::Message>(
                std::vector<char>(request.payload()), std::vector<at::Tensor>(request.tensors()),
                rpc::MessageType::SCRIPT_RET)));
    if (text == "no memory for the response") {
      testing::failAllocations(2); // of the response, and of the error that says so
    }
    return future;
  }

 private:
  mutable std::map<std::string, int> counts_;
};

// Signals of the thread that makes one, as Python's: each time they are asked for, the next of the given handlers runs.
class Signals {
 public:
  explicit Signals(std::vector<std::function<void()>> handlers) : handlers_(std::move(handlers)) {
    current = this;
  }
  ~Signals() {
    current = nullptr;
  }
  static SignalService service() {
    return {[] { return current != nullptr; }, [] { current->serve(); }};
  }
  size_t served() const {
    return served_;
  }

 private:
  void serve() {
    if (served_ < handlers_.size()) {
      handlers_[served_++]();
    }
  }
  static thread_local Signals* current;
  std::vector<std::function<void()>> handlers_;
  size_t served_ = 0;
};
thread_local Signals* Signals::current = nullptr;

void interrupt() {
  throw std::runtime_error("interrupted");
}

struct Group {
  explicit Group(int size, AgentOptions options = {}, const std::function<void(FakeNetwork&)>& prepare = nullptr)
      : network(std::make_shared<FakeNetwork>(size)) {
    if (prepare) {
      prepare(*network);
    }
    options.exchange.bulkChunk = 64 << 10;
    std::vector<GroupMember> members;
    for (int rank = 0; rank < size; ++rank) {
      members.push_back({"worker" + std::to_string(rank), "host"});
    }
    for (int rank = 0; rank < size; ++rank) {
      auto callback = std::make_unique<EchoCallback>();
      callbacks.push_back(callback.get());
      agents.push_back(
          std::make_shared<MpiAgent>(
              std::make_unique<FakeTransport>(network, rank), members, std::move(callback), options));
    }
    for (auto& agent : agents) {
      agent->start();
    }
  }
  ~Group() {
    for (auto& agent : agents) {
      agent->shutdown();
    }
  }
  JitFuturePtr call(
      int from,
      int to,
      const std::string& text,
      std::vector<at::Tensor> tensors = {},
      float timeout = -1) {
    return agents[from]->send(
        agents[from]->getWorkerInfo(static_cast<rpc::worker_id_t>(to)),
        c10::make_intrusive<rpc::Message>(
            std::vector<char>(text.begin(), text.end()), std::move(tensors), rpc::MessageType::SCRIPT_CALL),
        timeout);
  }
  void joinAll(float timeout = 30) {
    std::vector<std::thread> threads;
    for (auto& agent : agents) {
      threads.emplace_back([&] { agent->join(true, timeout); });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
  std::shared_ptr<FakeNetwork> network;
  std::vector<EchoCallback*> callbacks;
  std::vector<std::shared_ptr<MpiAgent>> agents;
};

RpcMessage answer(const JitFuturePtr& future) {
  future->waitAndThrow();
  return future->value().toCustomClass<rpc::Message>();
}

std::string textOf(const RpcMessage& message) {
  return {message->payload().begin(), message->payload().end()};
}

std::string errorOf(const JitFuturePtr& future) {
  future->wait();
  return future->hasError() ? future->tryRetrieveErrorMessage() : "no error";
}

void eventually(const std::function<bool()>& condition) {
  while (!condition()) { // or the test runs into its time limit
    std::this_thread::yield();
  }
}

} // namespace

TEST(agent_answers_calls_to_others_and_itself) {
  Group group(3);
  for (int to = 0; to < 3; ++to) {
    CHECK_EQUAL(textOf(answer(group.call(0, to, "hello"))), "hello");
  }
}

TEST(agent_carries_tensors_of_all_sizes) {
  Group group(2);
  for (const int64_t elements : {0L, 1L, 100L, 4095L, 4096L, 4097L, 100000L, 3000000L}) {
    const at::Tensor tensor = at::randn({elements});
    const auto response = answer(group.call(0, 1, "t", {tensor, tensor}));
    CHECK_THAT(response->tensors().size() == 2);
    CHECK_THAT(at::equal(response->tensors()[0], tensor));
    CHECK_THAT(response->tensors()[0].storage().is_alias_of(response->tensors()[1].storage()));
  }
}

TEST(agent_arguments_of_a_call_to_itself_are_copies) {
  Group group(1);
  const at::Tensor tensor = at::ones({3});
  const auto response = answer(group.call(0, 0, "t", {tensor}));
  CHECK_THAT(!response->tensors()[0].storage().is_alias_of(tensor.storage()));
}

TEST(agent_many_calls_both_ways) {
  AgentOptions options;
  options.exchange.windowRequests = 8;
  Group group(2, options);
  std::vector<JitFuturePtr> futures;
  for (int i = 0; i < 500; ++i) {
    futures.push_back(group.call(
        i % 2, 1 - i % 2, std::to_string(i),
        i % 7 == 0 ? std::vector<at::Tensor>{at::full({50000}, i)} : std::vector<at::Tensor>{}));
  }
  for (int i = 0; i < 500; ++i) {
    CHECK_EQUAL(textOf(answer(futures[i])), std::to_string(i));
  }
}

TEST(agent_errors_name_the_callee) {
  Group group(2);
  const std::string error = errorOf(group.call(0, 1, "throw"));
  CHECK_THAT(error.find("worker1") != std::string::npos);
  CHECK_THAT(error.find("rank 1 on host host") != std::string::npos);
  CHECK_THAT(error.find("the function failed") != std::string::npos);
}

TEST(agent_times_out_with_torchs_text_and_drops_the_late_response) {
  Group group(2);
  const std::string error = errorOf(group.call(0, 1, "hold", {}, 0.05F));
  CHECK_THAT(error.find("RPC ran for more than set timeout (50 ms)") != std::string::npos);
  group.callbacks[1]->held[0]->markCompleted(
      at::IValue(
          c10::make_intrusive<rpc::Message>(
              std::vector<char>(), std::vector<at::Tensor>(), rpc::MessageType::SCRIPT_RET)));
  CHECK_EQUAL(textOf(answer(group.call(0, 1, "after"))), "after");
}

TEST(agent_a_request_whose_time_is_over_before_it_has_begun_is_dropped) {
  AgentOptions options;
  options.numWorkerThreads = 1;
  options.exchange.windowBytes = 1000;
  for (const int to : {0, 1}) {
    Group group(2, options);
    std::promise<void> go;
    group.callbacks[to]->runs["block"] = [done = go.get_future().share()] { done.wait(); };
    const auto blocker = group.call(0, to, "block");
    eventually([&] { return group.agents[to]->getMetrics()["agent.server_active_calls"] == "1"; });
    // One is sent, and the others wait for its credit.
    std::vector<at::Tensor> tensors;
    std::vector<JitFuturePtr> late;
    for (int i = 0; i < 3; ++i) {
      tensors.push_back(at::ones({100000}));
      late.push_back(group.call(0, to, "late", {tensors.back()}, 0.05F));
    }
    for (const auto& future : late) {
      CHECK_THAT(errorOf(future).find("RPC ran for more than set timeout (50 ms)") != std::string::npos);
    }
    for (const at::Tensor& tensor : tensors) {
      eventually([&] { return tensor.use_count() == 1; });
    }
    if (to == 1) { // which gets this answer after it was told that nobody waits for them
      CHECK_EQUAL(textOf(answer(group.call(1, 0, "before"))), "before");
    }
    go.set_value();
    CHECK_EQUAL(textOf(answer(blocker)), "block");
    CHECK_EQUAL(textOf(answer(group.call(0, to, "after", {at::ones({100000})}))), "after");
    CHECK_EQUAL(group.callbacks[to]->count("late"), 0);
  }
}

TEST(agent_refuses_misuse) {
  Group group(2);
  CHECK_THROWS(group.call(0, 1, "x", {}, -2), "must not be negative");
  CHECK_THROWS(group.agents[0]->getWorkerInfo("nobody"), "could not find destination nobody");
  CHECK_THROWS(group.agents[0]->getWorkerInfo(static_cast<rpc::worker_id_t>(7)), "could not find destination 7");
  CHECK_THROWS(group.agents[0]->join(true, -1), "must not be negative");
}

TEST(agent_join_agrees_and_shutdown_closes_in_agreement) {
  for (const int size : {1, 2, 3, 6}) {
    Group group(size);
    for (int from = 0; from < size; ++from) {
      for (int to = 0; to < size; ++to) {
        answer(group.call(from, to, "x", {at::randn({40000})}));
      }
    }
    group.joinAll();
    for (auto& agent : group.agents) {
      agent->shutdown();
    }
    CHECK_THROWS(group.call(0, 0, "x"), "no longer running");
  }
}

// Rank 1 agrees and exits; that rank 2 may do so is still on its way from rank 0.
TEST(agent_a_process_that_has_agreed_and_ended_is_not_taken_for_one_that_crashed) {
  std::atomic<bool> late{true};
  AgentOptions options;
  options.watchInterval = std::chrono::milliseconds(5);
  Group group(3, options, [&](FakeNetwork& network) {
    network.delays = [&](int to, const std::string& frame) {
      constexpr uint32_t kDone = 3; // of Drain
      uint32_t kind = 0;
      if (to != 2 || parseFrame(frame.data(), frame.size())->kind != FrameKind::kDrain) {
        return false;
      }
      std::memcpy(&kind, frame.data() + sizeof(FrameHeader), sizeof(kind));
      return kind == kDone && late;
    };
  });
  std::vector<std::thread> threads;
  for (const int rank : {0, 2}) {
    threads.emplace_back([&, rank] { group.agents[rank]->join(true, 30); });
  }
  group.agents[1]->join(true, 30);
  group.network->end(1);
  std::this_thread::sleep_for(std::chrono::milliseconds(250)); // more than the last words of a process may take
  CHECK_THAT(group.agents[2]->lostWorkers().empty());
  late = false;
  for (std::thread& thread : threads) {
    thread.join(); // a join that fails ends this process
  }
}

TEST(agent_join_waits_for_a_call_under_way) {
  Group group(2);
  const auto future = group.call(0, 1, "hold");
  while ([&] {
    const std::lock_guard<std::mutex> lock(group.callbacks[1]->mutex);
    return group.callbacks[1]->held.empty();
  }()) {
    std::this_thread::yield();
  }
  CHECK_THROWS(group.agents[0]->join(true, 0.05F), "calls of this worker are unanswered: 1 to worker 'worker1'");
  group.callbacks[1]->held[0]->markCompleted(
      at::IValue(
          c10::make_intrusive<rpc::Message>(
              std::vector<char>(), std::vector<at::Tensor>(), rpc::MessageType::SCRIPT_RET)));
  answer(future);
  group.joinAll();
}

TEST(agent_join_waits_for_callbacks) {
  Group group(2);
  std::promise<void> release;
  const auto future = group.call(0, 1, "x");
  future->addCallback([released = release.get_future().share()](rpc::JitFuture&) { released.wait(); });
  CHECK_THROWS(group.agents[0]->join(true, 0.1F), "callbacks of 1 calls");
  release.set_value();
  group.joinAll();
}

TEST(agent_calls_to_one_who_left_fail_with_its_name) {
  Group group(3);
  const auto pending = group.call(0, 1, "hold");
  group.agents[1]->shutdown();
  const std::string error = errorOf(pending);
  CHECK_THAT(error.find("worker 'worker1' (rank 1 on host host)") != std::string::npos);
  CHECK_THAT(error.find("it has left") != std::string::npos);
  CHECK_THAT(errorOf(group.call(0, 1, "late")).find("it has left") != std::string::npos);
  CHECK_EQUAL(textOf(answer(group.call(0, 2, "others go on"))), "others go on");
  CHECK_THROWS(group.agents[0]->join(true, 30), "it has left");
}

TEST(agent_calls_to_a_lost_worker_are_pending_when_send_returns) {
  Group group(2);
  group.agents[1]->shutdown();
  errorOf(group.call(0, 1, "while it is found out"));
  for (int i = 0; i < 20; ++i) {
    const JitFuturePtr future = group.call(0, 1, "later");
    CHECK_THAT(!future->completed()); // torch's retry thread would run its callback itself
    std::promise<std::thread::id> completed;
    future->addCallback([&](rpc::JitFuture&) {
      completed.set_value(std::this_thread::get_id());
      throw std::runtime_error("as torch's RRefContext does");
    });
    CHECK_THAT(completed.get_future().get() != std::this_thread::get_id());
    CHECK_THAT(errorOf(future).find("worker1") != std::string::npos);
  }
}

TEST(agent_calls_to_a_lost_worker_keep_its_reason_when_this_one_leaves) {
  Group group(2);
  group.agents[1]->shutdown();
  errorOf(group.call(0, 1, "while it is found out"));
  const JitFuturePtr future = group.call(0, 1, "later");
  group.agents[0]->shutdown();
  CHECK_THAT(errorOf(future).find("it has left") != std::string::npos);
}

TEST(agent_lives_when_callbacks_throw) {
  Group group(2);
  const auto throwing = [](rpc::JitFuture&) { throw std::runtime_error("a callback failed"); };
  for (const int to : {0, 1}) {
    for (const char* text : {"fine", "throw"}) {
      const JitFuturePtr future = group.call(0, to, text);
      future->addCallback(throwing);
      errorOf(future);
    }
    const JitFuturePtr expired = group.call(0, to, "hold", {}, 0.05F);
    expired->addCallback(throwing);
    CHECK_THAT(errorOf(expired).find("RPC ran for more than set timeout") != std::string::npos);
  }
  const JitFuturePtr left = group.call(0, 1, "hold");
  left->addCallback(throwing);
  group.agents[0]->shutdown();
  CHECK_THAT(errorOf(left).find("was shut down") != std::string::npos);
}

TEST(agent_answers_even_when_there_is_no_memory_for_the_response) {
  Group group(2);
  const std::string error = errorOf(group.call(0, 1, "no memory for the response"));
  CHECK_THAT(error.find("worker1") != std::string::npos);
  CHECK_THAT(error.find("there was not enough memory") != std::string::npos);
  CHECK_EQUAL(textOf(answer(group.call(0, 1, "again"))), "again");
  group.joinAll();
}

namespace {

// Frames as rank 2 of three could send them, whatever its agent does.
struct Liar {
  explicit Liar(const std::shared_ptr<FakeNetwork>& network) : transport(network, 2), hold(tokens) {}
  void send(int to, FrameKind kind, uint64_t callId, const std::string& body = "") {
    FrameHeader header;
    header.kind = kind;
    header.callId = callId;
    header.bodyBytes = body.size();
    frame.assign(reinterpret_cast<const char*>(&header), sizeof(header));
    frame += body;
    transport.send(*hold, to, Channel::kFrame, frame.data(), frame.size(), &ignore);
  }
  struct Ignore final : Operation {
    void complete(ProgressToken&, const OperationStatus&) noexcept override {}
  } ignore;
  FakeTransport transport;
  TokenSource tokens;
  TokenHold hold;
  std::string frame;
};

} // namespace

TEST(agent_takes_an_answer_only_from_the_worker_that_was_called) {
  Group group(3);
  const JitFuturePtr held = group.call(0, 1, "hold");
  Liar(group.network).send(0, FrameKind::kResponse, uint64_t{1} << 32);
  const std::string error = errorOf(group.call(0, 2, "after that"));
  CHECK_THAT(error.find("worker2") != std::string::npos);
  CHECK_THAT(error.find("answered a call that was made to another worker") != std::string::npos);
  CHECK_THAT(!held->completed());
  CHECK_EQUAL(textOf(answer(group.call(0, 1, "still answers"))), "still answers");
}

TEST(agent_takes_drain_frames_only_in_turn) {
  struct Body {
    uint32_t kind, reserved;
    uint64_t sent, received;
  };
  const auto bytes = [](Body body) { return std::string(reinterpret_cast<const char*>(&body), sizeof(body)); };
  const std::vector<std::pair<int, std::string>> bad{
      {1, bytes({1, 0, 0, 0})}, // a report to a rank that is not its parent
      {0, bytes({3, 0, 0, 0})}, // a verdict for the root
      {1, bytes({3, 0, 0, 0})}, // a verdict of a rank that is no parent
      {0, bytes({9, 0, 0, 0})},
      {0, "short"}};
  for (const auto& [to, body] : bad) {
    Group group(3);
    Liar(group.network).send(to, FrameKind::kDrain, 0, body);
    const std::string error = errorOf(group.call(to, 2, "after that"));
    CHECK_THAT(error.find("worker2") != std::string::npos);
    CHECK_THAT(error.find("a frame that makes no sense") != std::string::npos);
    CHECK_THROWS(group.agents[to]->join(true, 30), "worker2");
  }
}

TEST(agent_believes_the_news_that_another_worker_is_lost) {
  Group group(3);
  const JitFuturePtr held = group.call(0, 1, "hold");
  Liar(group.network).send(0, FrameKind::kLost, 0, writeLossNews({1, "its host is gone"}));
  const std::string error = errorOf(held);
  CHECK_THAT(error.find("RPC to worker 'worker1'") == 0);
  CHECK_THAT(error.find("its host is gone, as worker 'worker2' (rank 2 on host host) has found") != std::string::npos);
  CHECK_EQUAL(textOf(answer(group.call(0, 2, "goes on"))), "goes on");
}

TEST(agent_that_is_given_up_by_the_others_gives_them_up) {
  Group group(3);
  const JitFuturePtr held = group.call(0, 1, "hold");
  Liar(group.network).send(0, FrameKind::kLost, 0, writeLossNews({0, "nothing was heard of it"}));
  CHECK_THAT(errorOf(held).find("this worker was given up by worker 'worker2'") != std::string::npos);
  CHECK_EQUAL(group.agents[0]->lostWorkers().size(), 2U);
}

TEST(agent_news_of_nobody_fail_who_sends_them) {
  for (const std::string& body : {std::string(), std::string("abc"), writeLossNews({3, ""}), writeLossNews({-1, ""})}) {
    Group group(3);
    Liar(group.network).send(0, FrameKind::kLost, 0, body);
    const std::string error = errorOf(group.call(0, 2, "after that"));
    CHECK_THAT(error.find("worker2") != std::string::npos);
    CHECK_THAT(error.find("a frame that makes no sense") != std::string::npos);
  }
}

TEST(agent_goodbye_tells_of_the_worker_that_was_lost_before) {
  Group group(3);
  group.network->end(2);
  errorOf(group.call(0, 2, "hold"));
  group.agents[0]->shutdown();
  const std::string error = errorOf(group.call(1, 0, "hold"));
  CHECK_THAT(error.find("worker0") != std::string::npos && error.find("worker2") != std::string::npos);
  CHECK_THAT(group.agents[1]->lostWorkers().at(0).cause.find("RPC to worker 'worker2'") == 0);
  CHECK_THROWS(group.agents[1]->join(true, 30), "not possible: RPC to worker 'worker2'");
}

TEST(agent_lost_workers_are_told_in_their_order) {
  Group group(3);
  for (const int rank : {2, 1}) {
    group.network->end(rank);
    errorOf(group.call(0, rank, "hold"));
  }
  const auto lost = group.agents[0]->lostWorkers();
  CHECK_EQUAL(lost.size(), 2U);
  CHECK_EQUAL(lost[0].rank, 2);
  CHECK_THAT(lost[0].reason.find("worker2") != std::string::npos);
  CHECK_EQUAL(lost[1].rank, 1);
}

TEST(agent_own_pending_calls_fail_at_shutdown) {
  Group group(2);
  const auto pending = group.call(0, 1, "hold");
  group.agents[0]->shutdown();
  CHECK_THAT(errorOf(pending).find("shut down on worker 'worker0'") != std::string::npos);
}

TEST(agent_counts_what_it_does) {
  Group group(2);
  answer(group.call(0, 1, "x", {at::randn({100000})}));
  const auto metrics = group.agents[0]->getMetrics();
  CHECK_EQUAL(metrics.at("agent.client_active_calls"), "0");
  CHECK_EQUAL(metrics.at("mpi.frames_sent"), "1");
  CHECK_THAT(std::stoul(metrics.at("mpi.bytes_sent")) > 400000);
}

TEST(agent_rests_until_a_peer_rings) {
  AgentOptions options;
  options.idling.spinTime = std::chrono::nanoseconds(0);
  options.idling.maxSleep = std::chrono::hours(1);
  options.idling.maxRest = std::chrono::hours(1);
  Group group(2, options, [](FakeNetwork& network) { network.rings = true; });
  for (int i = 0; i < 5; ++i) {
    // Long enough that sleeps have grown beyond what the test would wait for; an answer that comes earlier is as good.
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    CHECK_EQUAL(textOf(answer(group.call(0, 1, "hello"))), "hello");
  }
}

TEST(agent_fails_calls_to_a_process_that_has_ended) {
  AgentOptions options;
  options.watchInterval = std::chrono::milliseconds(1);
  Group group(3, options);
  const auto pending = group.call(0, 1, "hold");
  group.network->end(1);
  CHECK_THROWS(answer(pending), "'worker1' (rank 1 on host host) failed: its process has ended without leaving");
  CHECK_THROWS(answer(group.call(0, 1, "hello")), "its process has ended without leaving");
  CHECK_EQUAL(textOf(answer(group.call(0, 2, "hello"))), "hello");
  CHECK_EQUAL(textOf(answer(group.call(2, 0, "hello"))), "hello");
}

TEST(agent_completes_a_call_whose_answer_came_when_the_transport_broke) {
  std::atomic<MpiAgent*> caller{nullptr}; // once it has called
  const auto prepare = [&](FakeNetwork& network) {
    network.fails = [&](int rank) {
      return rank == 0 && caller != nullptr && caller.load()->caller().unanswered() == 0;
    };
  };
  Group group(2, {}, prepare);
  const JitFuturePtr future = group.call(0, 1, "hold");
  caller = group.agents[0].get();
  JitFuturePtr held;
  while (held == nullptr) {
    std::this_thread::yield();
    const std::lock_guard<std::mutex> lock(group.callbacks[1]->mutex);
    held = group.callbacks[1]->held.empty() ? nullptr : group.callbacks[1]->held[0];
  }
  held->markCompleted(
      at::IValue(
          c10::make_intrusive<rpc::Message>(
              std::vector<char>{'a'}, std::vector<at::Tensor>{}, rpc::MessageType::SCRIPT_RET)));
  CHECK_EQUAL(textOf(answer(future)), "a");
}

TEST(agent_serves_signals_while_it_waits_to_join) {
  AgentOptions options;
  options.signals = Signals::service();
  Group group(2, options);
  std::thread other;
  {
    Signals signals({[] {}, interrupt, [] {}, [&] { other = std::thread([&] { group.agents[1]->join(true, 30); }); }});
    CHECK_THROWS(group.agents[0]->join(true, 30), "interrupted");
    CHECK_EQUAL(signals.served(), size_t{2});
    group.agents[0]->join(true, 30); // once more
    CHECK_EQUAL(signals.served(), size_t{4});
  }
  other.join();
}

TEST(agent_serves_signals_while_send_waits_for_the_answer) {
  AgentOptions options;
  options.signals = Signals::service();
  Group group(2, options);
  const auto callAndWait = [&](const std::string& text) {
    const Caller::AnswerInSend answered(group.agents[0]->caller());
    return group.call(0, 1, text);
  };
  CHECK_EQUAL(textOf(answer(callAndWait("at once"))), "at once");
  {
    Signals signals({[&] { CHECK_EQUAL(textOf(answer(group.call(0, 1, "meanwhile"))), "meanwhile"); }, interrupt});
    CHECK_THROWS(callAndWait("hold"), "interrupted");
    CHECK_EQUAL(signals.served(), size_t{2});
  }
  {
    Signals signals({});
    CHECK_THAT(callAndWait("again")->completed());
  }
  CHECK_THAT(!group.call(0, 1, "hold")->completed()); // nobody waits for it in send()
  for (const JitFuturePtr& held : group.callbacks[1]->held) {
    held->markCompleted(
        at::IValue(
            c10::make_intrusive<rpc::Message>(
                std::vector<char>{}, std::vector<at::Tensor>{}, rpc::MessageType::SCRIPT_RET)));
  }
}

// As bytes that MPI has spoiled: requests and answers alike.
TEST(agent_a_message_that_makes_no_sense_fails_its_sender_and_no_other) {
  for (const FrameKind kind : {FrameKind::kRequest, FrameKind::kResponse}) {
    Group group(3);
    const auto other = group.call(0, 2, "hold");
    auto request = c10::make_intrusive<rpc::Message>(
        std::vector<char>{'h', 'o', 'l', 'd'}, std::vector<at::Tensor>(), rpc::MessageType::SCRIPT_CALL);
    const auto pending = group.agents[0]->send(group.agents[0]->getWorkerInfo(1), request, 60);

    std::string frame(sizeof(FrameHeader), '\0');
    const std::string body = "no outline of a message";
    FrameHeader header;
    header.kind = kind;
    header.callId = static_cast<uint64_t>(request->id());
    header.bodyBytes = body.size();
    std::memcpy(frame.data(), &header, sizeof(header));
    frame += body;
    struct Sent final : Operation {
      void complete(ProgressToken&, const OperationStatus&) noexcept override {}
    } sent;
    TokenSource tokens;
    const TokenHold token(tokens);
    FakeTransport(group.network, 1).send(*token, 0, Channel::kFrame, frame.data(), frame.size(), &sent);

    const std::string error = errorOf(pending);
    CHECK_THAT(error.find("of rank 1") != std::string::npos);
    CHECK_THAT(error.find("makes no sense") != std::string::npos);
    const std::string later = errorOf(group.call(0, 1, "later"));
    CHECK_THAT(later.find("RPC to worker 'worker1' (rank 1 on host host) failed") != std::string::npos);
    CHECK_THAT(later.find("makes no sense") != std::string::npos);
    CHECK_THAT(!other->completed());
    CHECK_EQUAL(textOf(answer(group.call(0, 2, "others go on"))), "others go on");
  }
}

TEST(agent_has_the_faults_that_are_asked_for) {
  AgentOptions options;
  options.faults =
      std::make_shared<Faults>(FaultOptions{{"SCRIPT_CALL", "RREF_USER_DELETE"}, {{"PYTHON_CALL", 0.1}}, 1});
  Group group(2, options);
  const auto send = [&](int to, rpc::MessageType type, float timeout = 30) {
    return group.agents[0]->send(
        group.agents[0]->getWorkerInfo(static_cast<rpc::worker_id_t>(to)),
        c10::make_intrusive<rpc::Message>(
            std::vector<char>{static_cast<char>('0' + to)}, std::vector<at::Tensor>(), type),
        timeout);
  };
  for (const int to : {0, 1}) {
    const auto failed = send(to, rpc::MessageType::SCRIPT_CALL);
    CHECK_THAT(failed->completed() && failed->hasError());
    CHECK_THAT(errorOf(failed).find("This SCRIPT_CALL was not sent") != std::string::npos);
    CHECK_EQUAL(textOf(answer(send(to, rpc::MessageType::SCRIPT_CALL))), std::to_string(to));

    const auto retried = send(to, rpc::MessageType::RREF_USER_DELETE);
    CHECK_THAT(!retried->completed()); // torch's retry thread would run its callback itself
    CHECK_THAT(errorOf(retried).find("This RREF_USER_DELETE was not sent") != std::string::npos);
    answer(send(to, rpc::MessageType::RREF_USER_DELETE));

    CHECK_THAT(errorOf(send(to, rpc::MessageType::PYTHON_CALL, 0.02F)).find("RPC ran for more") != std::string::npos);
    const auto begun = std::chrono::steady_clock::now();
    answer(send(to, rpc::MessageType::PYTHON_CALL));
    CHECK_THAT(std::chrono::steady_clock::now() - begun >= std::chrono::milliseconds(100));
  }
}
