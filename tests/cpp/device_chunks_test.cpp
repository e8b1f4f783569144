// Messages whose frame, or whose parts, come from a device or go to one: what waits, and what does not.
#include <deque>
#include <vector>

#include "check.h"
#include "exchange_rank.h"
#include "peer/exchange.h"

using namespace torch_rpc_mpi;
using namespace torch_rpc_mpi::testing;

namespace {

// A part in chunks of three bytes, of which as many are there as the test says.
class SlowSource final : public ChunkSource {
 public:
  SlowSource(std::string content, size_t& there, size_t& sent)
      : content_(std::move(content)),
        there_(there),
        sent_(sent) {}
  size_t chunks() const override {
    return (content_.size() + 2) / 3;
  }
  std::optional<ConstSpan> next() override {
    if (given_ == there_) {
      return std::nullopt;
    }
    const size_t first = 3 * given_++;
    return ConstSpan{content_.data() + first, std::min<size_t>(3, content_.size() - first)};
  }
  void sent() override {
    ++sent_;
  }

 private:
  const std::string content_;
  size_t& there_;
  size_t& sent_;
  size_t given_ = 0;
};

class SlowMessage final : public OutboundMessage {
 public:
  explicit SlowMessage(std::string content = "")
      : OutboundMessage(1, FrameKind::kRequest, 7),
        content_(std::move(content)) {
    if (!content_.empty()) {
      source_ = std::make_unique<SlowSource>(content_, there, sent);
    }
  }
  bool ready() override {
    if (breaks) {
      throw std::runtime_error("the device is broken");
    }
    return asked++ >= readyWhenAsked && *isReady;
  }
  ChunkSource* sourceOf(size_t) override {
    return source_.get();
  }
  bool light() const override {
    return false;
  }
  void failed(const std::string& reason) noexcept override {
    lastFailure = reason;
  }
  static inline size_t there = 0, sent = 0;
  static inline std::string lastFailure;
  bool breaks = false;
  int asked = 0, readyWhenAsked = 0;
  std::shared_ptr<bool> isReady = std::make_shared<bool>(true);

 protected:
  size_t planBody(std::vector<ConstSpan>& parts) override {
    if (!content_.empty()) {
      parts.push_back({nullptr, content_.size()});
    }
    return 4;
  }
  void writeBody(char* body) override {
    std::memcpy(body, "slow", 4);
  }

 private:
  const std::string content_;
  std::unique_ptr<ChunkSource> source_;
};

// Takes the same chunks, while there is room.
class NarrowSink final : public ChunkSink {
 public:
  NarrowSink(std::string& into, size_t& room) : into_(into), room_(room) {}
  size_t chunks() const override {
    return (into_.size() + 2) / 3;
  }
  std::optional<MutableSpan> next() override {
    if (room_ == 0) {
      return std::nullopt;
    }
    --room_;
    const size_t first = 3 * begun_++;
    return MutableSpan{into_.data() + first, std::min<size_t>(3, into_.size() - first)};
  }
  void received() override {
    ++arrived;
  }
  static inline size_t arrived = 0;

 private:
  std::string& into_;
  size_t& room_;
  size_t begun_ = 0;
};

struct SinkRank final : Rank {
  using Rank::Rank;
  std::unique_ptr<BulkTarget> makeTarget(int source, const FrameHeader& header, ConstSpan body) override {
    auto target = Rank::makeTarget(source, header, body);
    if (usesSink) {
      target->sinks.push_back(std::make_unique<NarrowSink>(static_cast<TextTarget&>(*target).memory[0], room));
      target->error = error;
    }
    return target;
  }
  bool usesSink = true;
  size_t room = 100;
  std::string error;
};

struct SlowPair {
  explicit SlowPair(ExchangeOptions options = Pair::smallOptions())
      : network(std::make_shared<FakeNetwork>(2)),
        a(network, 0, options),
        b(network, 1, options) {
    SlowMessage::there = SlowMessage::sent = NarrowSink::arrived = 0;
    SlowMessage::lastFailure.clear();
  }
  void settle() {
    for (int idle = 0; idle < 3; ++idle) {
      while (a.poll() | b.poll()) {
      }
    }
  }
  std::shared_ptr<FakeNetwork> network;
  Rank a;
  SinkRank b;
};

} // namespace

TEST(a_frame_waits_for_what_its_device_still_copies_and_others_pass_it) {
  SlowPair pair;
  auto slow = std::make_unique<SlowMessage>();
  const auto isReady = slow->isReady;
  *isReady = false;
  pair.a.post(std::move(slow));
  pair.a.post(request("fast"));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
  CHECK_EQUAL(pair.b.bodies[0], "fast");
  CHECK_THAT(pair.a.exchange.awaitsDevice(*pair.a.hold));
  CHECK_THAT(!pair.a.exchange.quiet(*pair.a.hold));
  *isReady = true;
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.back(), "slow");
  CHECK_THAT(!pair.a.exchange.awaitsDevice(*pair.a.hold));
  CHECK_THAT(pair.a.exchange.quiet(*pair.a.hold));
}

TEST(a_message_of_a_broken_device_fails_alone) {
  SlowPair pair;
  auto slow = std::make_unique<SlowMessage>();
  slow->breaks = true;
  pair.a.post(std::move(slow));
  pair.a.post(request("other"));
  pair.settle();
  CHECK_EQUAL(SlowMessage::lastFailure, "the device is broken");
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
}

TEST(what_gets_ready_while_it_is_gathered_is_sent) {
  auto options = Pair::smallOptions();
  options.windowRequests = 2;
  SlowPair pair(options);
  for (const char* text : {"first", "second", "third"}) {
    pair.a.post(smallRequest(text));
  }
  auto slow = std::make_unique<SlowMessage>();
  slow->readyWhenAsked = 1;
  pair.a.post(std::move(slow));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 2U);
  for (size_t taken = 0; taken < 2; ++taken) {
    pair.b.exchange.released(0, pair.b.charged[taken]);
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 4U);
  CHECK_EQUAL(pair.b.bodies.back(), "slow");
}

TEST(a_peer_that_fails_while_what_waits_for_a_device_is_sent_fails_all_of_it) {
  SlowPair pair;
  const auto isReady = std::make_shared<bool>(false);
  for (int i = 0; i < 3; ++i) {
    auto slow = std::make_unique<SlowMessage>();
    slow->isReady = isReady;
    pair.a.post(std::move(slow));
  }
  pair.settle();
  *isReady = true;
  pair.a.transport.sendsFail = true;
  pair.settle();
  CHECK_EQUAL(SlowMessage::lastFailure, "peer 1: the send failed");
  CHECK_EQUAL(pair.a.exchange.counters().waitingForDevice, 0U);
  CHECK_THAT(!pair.a.exchange.awaitsDevice(*pair.a.hold));
}

TEST(what_waits_for_a_device_is_not_sent_once_its_call_is_forgotten) {
  SlowPair pair;
  auto slow = std::make_unique<SlowMessage>();
  *slow->isReady = false;
  const auto isReady = slow->isReady;
  pair.a.post(std::move(slow));
  pair.settle();
  CHECK_THAT(pair.a.exchange.stagesRequest(*pair.a.hold, 1, 7) && !pair.a.exchange.holdsRequest(*pair.a.hold, 1, 7));
  CHECK_THAT(pair.a.exchange.forget(*pair.a.hold, 1, 7) != nullptr);
  CHECK_THAT(!pair.a.exchange.stagesRequest(*pair.a.hold, 1, 7));
  *isReady = true;
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 0U);
  CHECK_THAT(pair.a.exchange.quiet(*pair.a.hold));
}

TEST(what_is_not_sent_takes_no_credit) {
  SlowPair pair;
  const size_t window = Pair::smallOptions().windowRequests;
  for (size_t i = 0; i < window; ++i) {
    auto slow = std::make_unique<SlowMessage>();
    *slow->isReady = false;
    slow->breaks = i > 0;
    pair.a.post(std::move(slow));
  }
  pair.a.post(smallRequest("other"));
  CHECK_THAT(pair.a.exchange.forget(*pair.a.hold, 1, 7) != nullptr);
  for (size_t i = 0; i < window; ++i) {
    pair.a.post(smallRequest("more"));
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), window); // the receiver has not begun to run them, and so there are no more
}

TEST(chunks_are_sent_as_they_come_and_received_as_there_is_room) {
  SlowPair pair;
  const std::string content = "0123456789";
  pair.b.room = 1;
  pair.a.post(std::make_unique<SlowMessage>(content));
  pair.settle();
  CHECK_EQUAL(NarrowSink::arrived, 0U);
  SlowMessage::there = 2;
  pair.settle();
  CHECK_EQUAL(NarrowSink::arrived, 1U);
  CHECK_THAT(pair.b.exchange.awaitsDevice(*pair.b.hold));
  pair.b.room = 3;
  SlowMessage::there = 4;
  pair.settle();
  CHECK_EQUAL(NarrowSink::arrived, 4U);
  CHECK_EQUAL(SlowMessage::sent, 4U);
  CHECK_EQUAL(pair.b.parts.at(0).at(0), content);
  CHECK_THAT(pair.a.exchange.quiet(*pair.a.hold) && pair.b.exchange.quiet(*pair.b.hold));
}

TEST(what_a_target_lacks_is_told_when_all_has_come) {
  SlowPair pair;
  pair.b.error = "there is no memory";
  SlowMessage::there = 4;
  pair.a.post(std::make_unique<SlowMessage>("0123456789"));
  pair.settle();
  CHECK_EQUAL(pair.b.errors.at(0), "there is no memory");
}

TEST(a_peer_that_fails_fails_what_waits_for_a_device) {
  SlowPair pair;
  auto slow = std::make_unique<SlowMessage>();
  *slow->isReady = false;
  pair.a.post(std::move(slow));
  pair.a.post(std::make_unique<SlowMessage>("0123456789"));
  pair.settle();
  pair.a.exchange.fail(*pair.a.hold, 1, "it is gone");
  pair.settle();
  CHECK_EQUAL(SlowMessage::lastFailure, "peer 1: it is gone");
  CHECK_EQUAL(pair.a.failures, 1);
  CHECK_THAT(pair.a.exchange.quiet(*pair.a.hold));
}
