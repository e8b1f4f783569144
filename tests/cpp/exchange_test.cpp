#include "peer/exchange.h"

#include <numeric>

#include "check.h"
#include "fake_transport.h"

using namespace torch_rpc_mpi;
using torch_rpc_mpi::testing::FakeNetwork;
using torch_rpc_mpi::testing::FakeTransport;

namespace {

// A message whose body is a text and whose parts are byte strings.
class TextMessage final : public OutboundMessage {
 public:
  TextMessage(int peer, FrameKind kind, std::string text, std::vector<std::string> parts = {})
      : OutboundMessage(peer, kind, 7),
        text_(std::move(text)),
        parts_(std::move(parts)) {
    if (kind == FrameKind::kRequest) {
      header().chargedBytes = text_.size();
      for (const std::string& part : parts_) {
        header().chargedBytes += part.size();
      }
    }
  }
  bool light() const override {
    return false;
  }
  void failed(const std::string& reason) noexcept override {
    lastFailure = reason;
  }
  static inline std::string lastFailure;
  bool refuseToEncode = false;

 protected:
  size_t planBody(std::vector<ConstSpan>& parts) override {
    if (refuseToEncode) {
      throw std::runtime_error("cannot be encoded");
    }
    for (const std::string& part : parts_) {
      parts.push_back({part.data(), part.size()});
    }
    return text_.size();
  }
  void writeBody(char* body) override {
    std::copy(text_.begin(), text_.end(), body);
  }

 private:
  const std::string text_;
  const std::vector<std::string> parts_;
};

class TextTarget final : public BulkTarget {
 public:
  std::vector<std::string> memory;
};

// One rank: an exchange over the fake, and what it heard.
struct Rank : ExchangeListener {
  Rank(
      const std::shared_ptr<FakeNetwork>& network,
      int rank,
      ExchangeOptions options,
      std::vector<int> sources = {kAnySource})
      : transport(network, rank),
        exchange(transport, *this, options),
        hold(tokens) {
    transport.sources = std::move(sources);
    exchange.start(*hold);
  }
  ~Rank() override {
    exchange.close(*hold, true);
  }
  std::unique_ptr<BulkTarget> makeTarget(int, const FrameHeader& header, ConstSpan body) override {
    if (refuseTargets) {
      throw std::runtime_error("no memory");
    }
    auto target = std::make_unique<TextTarget>();
    const auto* sizes = reinterpret_cast<const uint64_t*>(body.data - header.bulkParts * sizeof(uint64_t));
    for (uint32_t i = 0; i < header.bulkParts; ++i) {
      target->memory.emplace_back(sizes[i], '\0');
    }
    for (std::string& memory : target->memory) {
      target->parts.push_back({memory.data(), memory.size()});
    }
    return target;
  }
  void onMessage(ProgressToken&, InboundMessage message) override {
    const size_t skip = message.header.bulkParts * sizeof(uint64_t);
    const ConstSpan body = message.body();
    bodies.emplace_back(body.data + skip, body.bytes - skip);
    errors.push_back(message.error);
    parts.push_back(
        message.target != nullptr ? static_cast<TextTarget&>(*message.target).memory : std::vector<std::string>{});
    if (message.header.kind == FrameKind::kRequest) {
      charged.push_back(message.header.chargedBytes);
    }
  }
  void onBadFrame(int source, const std::string& reason) override {
    badFrames.push_back(std::to_string(source) + ": " + reason);
  }
  void onPeerGone(ProgressToken&, int, const std::string& reason) override {
    gone.push_back(reason);
  }
  void post(OutboundPtr message) {
    exchange.post(*hold, std::move(message));
  }
  bool poll() {
    const bool moved = exchange.poll(*hold);
    exchange.takeFinished(*hold);
    for (auto& [message, reason] : exchange.takeFailed(*hold)) {
      message->failed(reason);
      ++failures;
    }
    return moved;
  }

  FakeTransport transport;
  Exchange exchange;
  TokenSource tokens;
  TokenHold hold;
  bool refuseTargets = false;
  int failures = 0;
  std::vector<std::string> bodies, errors, badFrames, gone;
  std::vector<std::vector<std::string>> parts;
  std::vector<uint64_t> charged;
};

struct Pair {
  explicit Pair(ExchangeOptions options = smallOptions())
      : network(std::make_shared<FakeNetwork>(2)),
        a(network, 0, options),
        b(network, 1, options) {}
  static ExchangeOptions smallOptions() {
    ExchangeOptions options;
    options.eagerLimit = 64;
    options.bulkChunk = 1000;
    return options;
  }
  void settle() {
    while (a.poll() | b.poll()) {
    }
  }
  std::shared_ptr<FakeNetwork> network;
  Rank a, b;
};

std::string pattern(size_t bytes, int seed) {
  std::string text(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i) {
    text[i] = static_cast<char>((i * 31 + static_cast<size_t>(seed) * 7) % 251);
  }
  return text;
}

OutboundPtr request(std::string text, std::vector<std::string> parts = {}) {
  return std::make_unique<TextMessage>(1, FrameKind::kRequest, std::move(text), std::move(parts));
}

// One that takes no credit for bytes.
OutboundPtr smallRequest(std::string text) {
  OutboundPtr message = request(std::move(text));
  message->header().chargedBytes = 0;
  return message;
}

} // namespace

TEST(exchange_carries_a_small_message_in_one_frame) {
  Pair pair;
  pair.a.post(request("hello"));
  CHECK_EQUAL(pair.a.transport.sends, 1);
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
  CHECK_EQUAL(pair.b.bodies[0], "hello");
}

TEST(exchange_sends_a_body_that_does_not_fit_on_the_bulk_channel) {
  Pair pair;
  const std::string text = pattern(5000, 1);
  pair.a.post(request(text));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
  CHECK_THAT(pair.b.bodies[0] == text);
}

TEST(exchange_carries_parts_of_every_size_around_the_chunk) {
  for (const size_t bytes : {1UL, 999UL, 1000UL, 1001UL, 1999UL, 2000UL, 2001UL, 10000UL}) {
    for (const size_t eager : {0UL, 100000UL}) {
      Pair pair;
      pair.network->eagerBytes = eager;
      const std::vector<std::string> parts{pattern(bytes, 1), pattern(3, 2), pattern(bytes + 1, 3)};
      pair.a.post(request("x", parts));
      pair.settle();
      CHECK_EQUAL(pair.b.parts.size(), 1U);
      CHECK_THAT(pair.b.parts[0] == parts);
      CHECK_EQUAL(pair.b.errors[0], "");
      CHECK_EQUAL(pair.a.exchange.counts().unfinishedSends, 0U);
      CHECK_EQUAL(pair.b.exchange.counts().bulkInFlight, 0U);
    }
  }
}

TEST(exchange_keeps_messages_apart_when_bulk_and_small_are_mixed) {
  Pair pair;
  pair.network->eagerBytes = 100;
  for (int i = 0; i < 50; ++i) {
    pair.a.post(
        i % 3 == 0 ? request(std::to_string(i))
                   : request(pattern(i % 3 == 1 ? 10 : 3000, i), {pattern(700 * (i % 5) + 1, i), pattern(i + 1, i)}));
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 50U);
  size_t matched = 0;
  for (size_t m = 0; m < 50; ++m) {
    for (int i = 0; i < 50; ++i) {
      const bool same = i % 3 == 0 ? pair.b.bodies[m] == std::to_string(i) && pair.b.parts[m].empty()
                                   : pair.b.parts[m].size() == 2 && pair.b.parts[m][1] == pattern(i + 1, i) &&
              pair.b.parts[m][0] == pattern(700 * (i % 5) + 1, i);
      matched += same ? 1 : 0;
    }
  }
  CHECK_EQUAL(matched, 50U);
}

TEST(exchange_a_small_frame_overtakes_a_large_transfer) {
  Pair pair;
  pair.network->eagerBytes = 100;
  pair.a.post(request("large", {pattern(100000, 1)}));
  pair.a.post(request("small"));
  for (int i = 0; i < 3; ++i) {
    pair.b.poll();
    pair.a.poll();
  }
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
  CHECK_EQUAL(pair.b.bodies[0], "small");
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 2U);
}

TEST(exchange_requests_beyond_the_window_wait_unencoded_until_taken) {
  auto options = Pair::smallOptions();
  options.windowRequests = 4;
  Pair pair(options);
  for (int i = 0; i < 10; ++i) {
    pair.a.post(request(std::to_string(i)));
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 4U);
  CHECK_EQUAL(pair.a.exchange.counts().waitingForCredit, 6U);
  CHECK_THAT(!pair.a.exchange.wouldSendAtOnce(1, 1));
  for (size_t taken = 0; taken < 10; ++taken) {
    CHECK_THAT(taken < pair.b.bodies.size());
    pair.b.exchange.released(0, pair.b.charged[taken]);
    pair.settle();
  }
  CHECK_EQUAL(pair.b.bodies.size(), 10U);
  CHECK_THAT(pair.a.exchange.wouldSendAtOnce(1, 1));
}

TEST(exchange_reports_little_credit_when_nothing_else_tells_of_it) {
  auto options = Pair::smallOptions();
  options.windowRequests = 4;
  Pair pair(options);
  for (int i = 0; i < 5; ++i) {
    pair.a.post(request(std::to_string(i)));
  }
  pair.settle();
  pair.b.exchange.released(0, pair.b.charged[0]); // less than half a window, and no response follows
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 4U);
  const auto now = std::chrono::steady_clock::now();
  pair.b.exchange.reportStaleCredits(*pair.b.hold, now);
  pair.b.exchange.reportStaleCredits(*pair.b.hold, now + std::chrono::milliseconds(1));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 5U);
}

TEST(exchange_bytes_are_bounded_and_a_message_above_the_window_goes_alone) {
  auto options = Pair::smallOptions();
  options.windowBytes = 1000;
  Pair pair(options);
  pair.a.post(request("big", {pattern(5000, 1)}));
  pair.a.post(request("next"));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
  pair.b.exchange.released(0, pair.b.charged[0]);
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 2U);
}

TEST(exchange_small_requests_do_not_wait_behind_large_ones) {
  auto options = Pair::smallOptions();
  options.windowBytes = 1000;
  options.windowRequests = 4;
  Pair pair(options);
  pair.a.post(request("large", {pattern(5000, 1)}));
  pair.a.post(request("next large", {pattern(5000, 2)}));
  CHECK_THAT(!pair.a.exchange.wouldSendAtOnce(1, 1));
  CHECK_THAT(pair.a.exchange.wouldSendAtOnce(1, 0));
  for (int i = 0; i < 5; ++i) {
    pair.a.post(smallRequest(std::to_string(i)));
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 4U); // the first large one, and as many small ones as the other window allows
  CHECK_EQUAL(pair.a.exchange.counts().waitingForCredit, 3U);
  CHECK_THAT(!pair.a.exchange.wouldSendAtOnce(1, 0));
  // The large one that waits goes before the small ones that do, whatever the order in which they were called.
  for (const uint64_t charged : pair.b.charged) {
    pair.b.exchange.released(0, charged);
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 7U);
  CHECK_EQUAL(pair.a.exchange.counts().waitingForCredit, 0U);
}

TEST(exchange_a_large_request_is_not_kept_waiting_by_small_ones) {
  auto options = Pair::smallOptions();
  options.windowBytes = 1000;
  options.windowRequests = 2;
  Pair pair(options);
  pair.a.post(smallRequest("small"));
  pair.a.post(smallRequest("small"));
  pair.a.post(smallRequest("small"));
  pair.a.post(request("large", {pattern(5000, 1)}));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 2U);
  pair.b.exchange.released(0, 0);
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 3U);
  CHECK_EQUAL(pair.b.bodies[2], "large");
}

TEST(exchange_responses_pass_where_requests_wait) {
  auto options = Pair::smallOptions();
  options.windowRequests = 1;
  Pair pair(options);
  pair.a.post(request("one"));
  pair.a.post(request("two"));
  pair.a.post(std::make_unique<TextMessage>(1, FrameKind::kResponse, "answer"));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 2U);
  CHECK_EQUAL(pair.b.bodies[1], "answer");
}

TEST(exchange_drops_what_has_no_memory_and_goes_on) {
  Pair pair;
  pair.network->eagerBytes = 100;
  pair.b.refuseTargets = true;
  pair.a.post(request("lost", {pattern(5000, 1), pattern(10, 2)}));
  pair.settle();
  CHECK_EQUAL(pair.b.errors.size(), 1U);
  CHECK_EQUAL(pair.b.errors[0], "no memory");
  pair.b.refuseTargets = false;
  pair.a.post(request("kept", {pattern(5000, 3)}));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.back(), "kept");
  CHECK_THAT(pair.b.parts.back()[0] == pattern(5000, 3));
}

TEST(exchange_reports_a_bad_frame_with_its_source) {
  Pair pair;
  struct Ignore : Operation {
    void complete(ProgressToken&, const OperationStatus&) noexcept override {}
  } ignore;
  const std::string garbage = pattern(60, 5);
  pair.a.transport.send(*pair.a.hold, 1, Channel::kFrame, garbage.data(), garbage.size(), &ignore);
  const std::string tooShort = "x";
  pair.a.transport.send(*pair.a.hold, 1, Channel::kFrame, tooShort.data(), tooShort.size(), &ignore);
  const std::string tooLong = pattern(10000, 6);
  pair.network->eagerBytes = 100000;
  pair.a.transport.send(*pair.a.hold, 1, Channel::kFrame, tooLong.data(), tooLong.size(), &ignore);
  FrameHeader lying;
  lying.bodyBytes = 1000;
  pair.a.transport.send(*pair.a.hold, 1, Channel::kFrame, &lying, sizeof(lying), &ignore);
  pair.settle();
  CHECK_EQUAL(pair.b.badFrames.size(), 4U);
  CHECK_THAT(pair.b.badFrames[0].starts_with("0: "));
  pair.a.post(request("still works"));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
}

TEST(exchange_a_message_that_cannot_be_encoded_fails_alone) {
  Pair pair;
  auto bad = std::make_unique<TextMessage>(1, FrameKind::kRequest, "bad");
  bad->refuseToEncode = true;
  pair.a.post(std::move(bad));
  pair.a.post(request("good"));
  pair.settle();
  CHECK_EQUAL(pair.a.failures, 1);
  CHECK_EQUAL(TextMessage::lastFailure, "cannot be encoded");
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
}

TEST(exchange_refuses_messages_to_a_peer_that_is_gone) {
  auto options = Pair::smallOptions();
  options.windowRequests = 1;
  Pair pair(options);
  pair.a.post(request("sent"));
  pair.a.post(request("waits"));
  pair.a.exchange.dropPeer(*pair.a.hold, 1, "it left");
  pair.a.post(request("late"));
  pair.settle();
  CHECK_EQUAL(pair.a.failures, 2);
  CHECK_EQUAL(TextMessage::lastFailure, "it left");
  CHECK_EQUAL(pair.a.exchange.counts().waitingForCredit, 0U);
}

TEST(exchange_refuses_messages_after_it_closed) {
  Pair pair;
  pair.a.exchange.close(*pair.a.hold, false);
  pair.a.post(request("late"));
  CHECK_THAT(!pair.a.poll());
  CHECK_EQUAL(pair.a.failures, 1);
  CHECK_EQUAL(TextMessage::lastFailure, "RPC was shut down");
}

TEST(exchange_receives_from_each_peer_where_any_source_will_not_do) {
  const auto network = std::make_shared<FakeNetwork>(3);
  Rank receiver(network, 0, Pair::smallOptions(), {1, 2});
  Rank one(network, 1, Pair::smallOptions());
  Rank two(network, 2, Pair::smallOptions());
  std::vector<std::string> expected;
  for (int i = 0; i < 100; ++i) { // more than are posted, in bursts of one source
    Rank& sender = i / 25 % 2 == 0 ? one : two;
    sender.post(std::make_unique<TextMessage>(0, FrameKind::kResponse, std::to_string(i)));
    expected.push_back(std::to_string(i));
  }
  while (receiver.poll() | one.poll() | two.poll()) {
  }
  CHECK_THAT(receiver.bodies == expected);
}

TEST(exchange_has_nothing_due_after_it_closed) {
  auto options = Pair::smallOptions();
  options.windowRequests = 4;
  Pair pair(options);
  for (int i = 0; i < 4; ++i) {
    pair.a.post(request(std::to_string(i)));
  }
  pair.settle();
  pair.b.exchange.close(*pair.b.hold, false);
  for (const uint64_t charged : pair.b.charged) {
    pair.b.exchange.released(0, charged);
  }
  CHECK_THAT(pair.b.exchange.hasDue());
  CHECK_THAT(!pair.b.poll());
  CHECK_THAT(!pair.b.exchange.hasDue());
}

TEST(frame_pool_reuses_buffers) {
  auto pool = std::make_shared<FramePool>(4096);
  char* first = nullptr;
  {
    const FrameBuffer buffer = pool->get();
    first = buffer.data();
  }
  CHECK_THAT(pool->get().data() == first);
}
