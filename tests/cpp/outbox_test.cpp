#include "agent/outbox.h"

#include "check.h"
#include "exchange_rank.h"

using namespace torch_rpc_mpi;
using namespace torch_rpc_mpi::testing;

namespace {

// Turns are the tests' own.
class NoEngine final : public Engine {
 public:
  void start() override {}
  bool stop(std::chrono::milliseconds) override {
    return true;
  }
  using Engine::post;
  void post(std::vector<TaskPtr>&) override {}
  void submitted(bool) override {}
  void driveFor(const void*, const std::function<bool()>&) override {}
  void withToken(const std::function<void(ProgressToken&)>&) override {}
  void wake() override {}
  EngineCounts counts() const override {
    return {};
  }
  std::optional<size_t> queuedBefore(const std::function<bool(const Task&)>&) const override {
    return {};
  }
  bool onEngineThread() const override {
    return false;
  }
};

struct Sender : Pair {
  void submit(const std::string& text, Clock::time_point deadline) {
    OutboundPtr message = request(text);
    message->setDeadline(deadline);
    outbox.submit(std::move(message), /*expectsReply=*/true);
  }
  std::vector<std::string> arrivedAfter(Clock::time_point lastTurn) {
    outbox.post(*a.hold, lastTurn);
    settle();
    return b.bodies;
  }
  std::shared_ptr<Engine> engine = std::make_shared<NoEngine>();
  Outbox outbox{a.exchange, engine, 64};
};

} // namespace

TEST(outbox_sends_no_request_whose_call_the_last_turn_has_given_up) {
  const auto now = Clock::now();
  const auto later = now + std::chrono::milliseconds(1);
  Sender sender;
  sender.submit("given up", now);
  sender.submit("in time", later);
  sender.submit("without a limit", Clock::time_point::max());
  CHECK_THAT(sender.arrivedAfter(now) == std::vector<std::string>({"in time", "without a limit"}));
  CHECK_EQUAL(sender.a.sent, 3U); // none is kept
  CHECK_EQUAL(sender.a.failures, 0);
  CHECK_THAT(!sender.outbox.filled());
}

TEST(outbox_keeps_its_order_from_turn_to_turn) {
  Sender sender;
  std::vector<std::string> texts;
  for (int turn = 0; turn < 3; ++turn) {
    for (int i = 0; i < 20; ++i) {
      texts.push_back(std::to_string(texts.size()));
      sender.submit(texts.back(), Clock::time_point::max());
    }
    CHECK_THAT(sender.arrivedAfter(Clock::now()) == texts);
  }
  CHECK_THAT(!sender.outbox.post(*sender.a.hold, Clock::now()));
}
