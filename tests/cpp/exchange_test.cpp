#include "peer/exchange.h"

#include <numeric>

#include "check.h"
#include "exchange_rank.h"

using namespace torch_rpc_mpi;
using namespace torch_rpc_mpi::testing;

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
      CHECK_EQUAL(pair.a.exchange.counters().unfinishedSends, 0U);
      CHECK_EQUAL(pair.b.exchange.counters().partsIn, 0U);
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
    pair.a.post(smallRequest(std::to_string(i)));
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 4U);
  CHECK_EQUAL(pair.a.exchange.counters().waitingForCredit, 6U);
  CHECK_THAT(!pair.a.exchange.wouldSendAtOnce(1, 0));
  for (size_t taken = 0; taken < 10; ++taken) {
    CHECK_THAT(taken < pair.b.bodies.size());
    pair.b.exchange.released(0, pair.b.charged[taken]);
    pair.settle();
  }
  CHECK_EQUAL(pair.b.bodies.size(), 10U);
  CHECK_THAT(pair.a.exchange.wouldSendAtOnce(1, 0));
}

TEST(exchange_reports_little_credit_when_nothing_else_tells_of_it) {
  auto options = Pair::smallOptions();
  options.windowRequests = 4;
  Pair pair(options);
  for (int i = 0; i < 5; ++i) {
    pair.a.post(smallRequest(std::to_string(i)));
  }
  pair.settle();
  pair.b.exchange.released(0, pair.b.charged[0]); // less than half a window, and no response follows
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 4U);
  const auto now = std::chrono::steady_clock::now();
  pair.b.exchange.look(*pair.b.hold, now);
  pair.b.exchange.look(*pair.b.hold, now + std::chrono::milliseconds(1));
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
  CHECK_EQUAL(pair.a.exchange.counters().waitingForCredit, 3U);
  CHECK_THAT(!pair.a.exchange.wouldSendAtOnce(1, 0));
  // The large one that waits goes before the small ones that do, whatever the order in which they were called.
  for (const uint64_t charged : pair.b.charged) {
    pair.b.exchange.released(0, charged);
  }
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 7U);
  CHECK_EQUAL(pair.a.exchange.counters().waitingForCredit, 0U);
}

TEST(exchange_a_large_request_is_not_kept_waiting_by_small_ones) {
  auto options = Pair::smallOptions();
  options.windowBytes = 1000;
  options.windowRequests = 2;
  Pair pair(options);
  pair.a.post(smallRequest("small"));
  pair.a.post(smallRequest("small"));
  pair.a.post(smallRequest("small"));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 2U);
  pair.a.post(request("large", {pattern(5000, 1)})); // for which those may be waiting that fill the window
  pair.a.post(request("next large", {pattern(5000, 2)}));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 3U);
  CHECK_EQUAL(pair.b.bodies[2], "large");
  for (size_t taken = 0; taken < 3; ++taken) {
    pair.b.exchange.released(0, pair.b.charged[taken]);
    pair.settle();
  }
  CHECK_EQUAL(pair.b.bodies.size(), 5U);
}

TEST(exchange_responses_pass_where_requests_wait) {
  auto options = Pair::smallOptions();
  options.windowRequests = 1;
  Pair pair(options);
  pair.a.post(smallRequest("one"));
  pair.a.post(smallRequest("two"));
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
  CHECK_THAT(pair.b.errors[0].find("there is no memory for a tensor") != std::string::npos);
  pair.b.refuseTargets = false;
  pair.a.post(request("kept", {pattern(5000, 3)}));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.back(), "kept");
  CHECK_THAT(pair.b.parts.back()[0] == pattern(5000, 3));
}

TEST(exchange_fails_a_peer_whose_body_makes_no_sense) {
  Pair pair;
  pair.b.misunderstands = true;
  pair.a.post(request("nonsense", {pattern(5000, 1), pattern(10, 2)}));
  pair.settle();
  CHECK_THAT(pair.b.bodies.empty());
  CHECK_EQUAL(pair.b.ended.size(), 1U);
  CHECK_THAT(pair.b.ended[0].find("it ends early") != std::string::npos);
}

// What a peer must not send: each of them fails it, and from then on nothing of it counts.
namespace {

struct Ignore final : Operation {
  void complete(ProgressToken&, const OperationStatus&) noexcept override {}
} ignore;

void sendRaw(Pair& pair, Channel channel, const std::string& bytes) {
  pair.a.transport.send(*pair.a.hold, 1, channel, bytes.data(), bytes.size(), &ignore);
}

std::string frame(const FrameHeader& header, const std::string& body = "") {
  return std::string(reinterpret_cast<const char*>(&header), sizeof(header)) + body;
}

FrameHeader headerOf(FrameKind kind, uint64_t bodyBytes, uint32_t bulkParts = 0) {
  FrameHeader header;
  header.kind = kind;
  header.bodyBytes = bodyBytes;
  header.bulkParts = bulkParts;
  return header;
}

} // namespace

TEST(exchange_a_frame_that_makes_no_sense_fails_its_peer) {
  FrameHeader acknowledging = headerOf(FrameKind::kCredit, 0);
  acknowledging.releasedRequests = 3;
  FrameHeader acknowledgingBytes = headerOf(FrameKind::kCredit, 0);
  acknowledgingBytes.releasedBytes = 1;
  const std::vector<std::pair<std::string, std::string>> bad{
      {pattern(60, 5), "not of this protocol"},
      {"x", "not of this protocol"},
      {pattern(10000, 6), "could not be received"},
      {frame(headerOf(FrameKind::kRequest, 1000)), "not of this protocol"},
      {frame(headerOf(static_cast<FrameKind>(77), 0)), "not of this protocol"},
      {frame(headerOf(FrameKind::kRequest, 8, 2), "12345678"), "not of this protocol"},
      {frame(headerOf(FrameKind::kForget, 1), "x"), "not of this protocol"},
      {frame(headerOf(FrameKind::kBatch, 3), "abc"), "a batch of frames that makes no sense"},
      {frame(headerOf(FrameKind::kBatch, 56), frame(headerOf(FrameKind::kResponse, 1))), "a batch of frames"},
      {frame(headerOf(FrameKind::kBatch, 56), frame(headerOf(FrameKind::kBatch, 0))), "a batch of frames"},
      {frame(acknowledging), "it acknowledges 3 requests"},
      {frame(acknowledgingBytes), "of 1 bytes"}};
  for (const auto& [bytes, why] : bad) {
    Pair pair;
    pair.network->eagerBytes = 100000;
    sendRaw(pair, Channel::kFrame, bytes);
    pair.a.post(request("after it"));
    pair.settle();
    CHECK_EQUAL(pair.b.ended.size(), 1U);
    CHECK_THAT(pair.b.ended[0].starts_with("peer 0: ") && pair.b.ended[0].find(why) != std::string::npos);
    CHECK_EQUAL(pair.b.bodies.size(), 0U);
    CHECK_EQUAL(pair.b.exchange.counters().framesDropped, 1U);
    CHECK_EQUAL(pair.b.transport.parked, 1);
  }
}

TEST(exchange_a_chunk_that_is_not_as_announced_fails_its_peer_and_spoils_no_other_message) {
  for (const size_t wrong : {size_t{0}, size_t{1}, size_t{999}, size_t{2000}}) { // of 1000
    Pair pair;
    pair.network->eagerBytes = 100000;
    const uint64_t bytes = 1000;
    sendRaw(
        pair, Channel::kFrame,
        frame(
            headerOf(FrameKind::kRequest, sizeof(bytes), 1),
            std::string(reinterpret_cast<const char*>(&bytes), sizeof(bytes))));
    sendRaw(pair, Channel::kBulk, pattern(wrong, 1));
    pair.a.post(request("next", {pattern(1000, 2)}));
    pair.settle();
    CHECK_EQUAL(pair.b.bodies.size(), 0U); // neither a part of the first nor the second with its chunks
    CHECK_EQUAL(pair.b.ended.size(), 1U);
    CHECK_EQUAL(pair.b.exchange.counters().partsIn, 0U);
  }
}

TEST(exchange_a_body_for_which_there_is_no_memory_fails_its_peer_if_it_alone_tells_what_follows) {
  Pair pair;
  FrameHeader header = headerOf(FrameKind::kRequest, uint64_t{1} << 60, 1);
  header.bodyInBulk = 1;
  sendRaw(pair, Channel::kFrame, frame(header));
  pair.settle();
  CHECK_EQUAL(pair.b.ended.size(), 1U);
  CHECK_THAT(
      pair.b.ended[0].find("there is no memory for a message of 1152921504606846976 bytes") != std::string::npos);
  CHECK_EQUAL(pair.b.bodies.size(), 0U);
}

TEST(exchange_other_peers_do_not_notice_that_one_has_failed) {
  const auto network = std::make_shared<FakeNetwork>(3);
  network->eagerBytes = 0;
  Rank receiver(network, 0, Pair::smallOptions());
  Rank good(network, 1, Pair::smallOptions());
  Rank bad(network, 2, Pair::smallOptions());
  const auto toReceiver = [](const std::string& text, std::vector<std::string> parts = {}) {
    return std::make_unique<TextMessage>(0, FrameKind::kResponse, text, std::move(parts));
  };
  good.post(toReceiver("first", {pattern(5000, 1)}));
  bad.post(toReceiver("lost", {pattern(5000, 2)}));
  receiver.poll();
  receiver.exchange.fail(*receiver.hold, 2, "it crashed");
  good.post(toReceiver("second", {pattern(3000, 3)}));
  while (receiver.poll() | good.poll()) {
  }
  CHECK_THAT(receiver.bodies == (std::vector<std::string>{"first", "second"}));
  CHECK_THAT(receiver.parts[1][0] == pattern(3000, 3));
  CHECK_THAT(receiver.exchange.quiet(*receiver.hold));
}

// In both directions at once, whatever was under way.
TEST(exchange_a_peer_that_fails_leaves_nothing_to_wait_for) {
  for (int turns = 0; turns < 12; ++turns) {
    Pair pair;
    pair.network->eagerBytes = turns % 2 == 0 ? 0 : 100;
    pair.a.post(request("out", {pattern(9000, 1), pattern(1500, 2)}));
    pair.a.post(request(pattern(3000, 3), {pattern(100, 4)}));
    pair.b.post(
        std::make_unique<TextMessage>(
            0, FrameKind::kResponse, pattern(4000, 5), std::vector<std::string>{pattern(7000, 6)}));
    for (int turn = 0; turn < turns; ++turn) {
      pair.a.poll();
      pair.b.poll();
    }
    pair.a.exchange.fail(*pair.a.hold, 1, "first");
    pair.a.exchange.fail(*pair.a.hold, 1, "second");
    pair.settle();
    CHECK_THAT(pair.a.exchange.quiet(*pair.a.hold));
    CHECK_EQUAL(pair.a.ended.size(), 1U);
    CHECK_EQUAL(pair.a.ended[0], "peer 1: first");
    CHECK_THAT(pair.a.exchange.stateOf(1) == Peer::State::kFailed);
  }
}

namespace {

// One part of 64 pages, of which somebody else may have a share.
class SharedMessage final : public OutboundMessage {
 public:
  static constexpr size_t kPage = 4096;
  static constexpr size_t kBytes = 64 * kPage;
  explicit SharedMessage(char* memory) : OutboundMessage(1, FrameKind::kRequest, 7), memory_(memory) {}
  bool light() const override {
    return false;
  }
  void failed(const std::string&) noexcept override {}
  bool giveBackMemory() noexcept override {
    if (!shared) {
      giveBack(memory_, kBytes);
    }
    return !shared;
  }
  static inline bool shared = false;

 protected:
  size_t planBody(std::vector<ConstSpan>& parts) override {
    parts.push_back({memory_, kBytes});
    return 0;
  }
  void writeBody(char*) override {}

 private:
  char* const memory_;
};

} // namespace

// But for the four chunks that may still be read.
TEST(exchange_what_a_failed_peer_was_sent_gives_its_memory_back_when_nobody_else_has_it) {
  auto options = Pair::smallOptions();
  options.bulkChunk = 2 * SharedMessage::kPage;
  Pair pair(options);
  pair.network->eagerBytes = 0;
  const std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(SharedMessage::kPage, SharedMessage::kBytes)), &std::free);
  std::fill_n(memory.get(), SharedMessage::kBytes, 'x');
  const auto kept = [&](size_t bytes) {
    return static_cast<size_t>(std::count(memory.get(), memory.get() + bytes, 'x'));
  };
  SharedMessage::shared = true;
  pair.a.post(std::make_unique<SharedMessage>(memory.get()));
  auto now = Clock::now();
  const auto look = [&] { pair.a.exchange.look(*pair.a.hold, now += std::chrono::seconds(1)); };
  look();
  pair.a.exchange.fail(*pair.a.hold, 1, "it crashed");
  look();
  CHECK_EQUAL(kept(SharedMessage::kBytes), SharedMessage::kBytes);
  SharedMessage::shared = false;
  look();
  CHECK_EQUAL(kept(SharedMessage::kBytes), 4 * options.bulkChunk);
  CHECK_EQUAL(kept(4 * options.bulkChunk), 4 * options.bulkChunk);
}

TEST(exchange_what_a_failed_peer_had_sent_in_part_takes_no_memory) {
  struct PagesTarget final : BulkTarget {
    PagesTarget() : memory(SharedMessage::kBytes + SharedMessage::kPage, 'x') {
      parts.push_back({memory.data(), SharedMessage::kBytes});
    }
    std::vector<char> memory;
  };
  struct PagesRank final : Rank {
    using Rank::Rank;
    std::unique_ptr<BulkTarget> makeTarget(int, const FrameHeader&, ConstSpan) override {
      auto made = std::make_unique<PagesTarget>();
      target = made.get();
      return made;
    }
    PagesTarget* target = nullptr;
  };
  const auto network = std::make_shared<FakeNetwork>(2);
  network->eagerBytes = 0;
  auto options = Pair::smallOptions();
  options.bulkChunk = 2 * SharedMessage::kPage;
  Rank sender(network, 0, options);
  PagesRank receiver(network, 1, options);
  const std::vector<char> memory(SharedMessage::kBytes, 'y');
  sender.post(std::make_unique<SharedMessage>(const_cast<char*>(memory.data())));
  receiver.poll();
  receiver.poll();
  CHECK_THAT(std::count(receiver.target->memory.begin(), receiver.target->memory.end(), 'y') > 0);
  receiver.exchange.fail(*receiver.hold, 0, "it crashed");
  const std::vector<char>& left = receiver.target->memory; // kept for ever: MPI may still write to it
  CHECK_THAT(std::count(left.begin(), left.end(), '\0') > static_cast<ptrdiff_t>(62 * SharedMessage::kPage));
}

namespace {

// Rank 0's goodbye has come, but not all of the parts of its last response.
struct LeavingPair : Pair {
  LeavingPair() {
    network->eagerBytes = 0;
    a.post(std::make_unique<TextMessage>(1, FrameKind::kResponse, "last", std::vector<std::string>{pattern(5000, 1)}));
    b.poll();
    b.exchange.leaves(*b.hold, 0, "it left", left);
  }
  const Exchange::Time left = std::chrono::steady_clock::now();
};

} // namespace

TEST(exchange_a_peer_that_leaves_is_gone_when_what_it_had_sent_has_arrived) {
  LeavingPair pair;
  CHECK_THAT(pair.b.exchange.stateOf(0) == Peer::State::kLeaving);
  pair.b.post(std::make_unique<TextMessage>(0, FrameKind::kRequest, "too late"));
  pair.settle();
  CHECK_EQUAL(pair.b.failures, 1);
  CHECK_EQUAL(TextMessage::lastFailure, "peer 0: it left");
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
  CHECK_THAT(pair.b.parts[0][0] == pattern(5000, 1));
  pair.b.exchange.look(*pair.b.hold, pair.left + std::chrono::milliseconds(10));
  CHECK_THAT(pair.b.exchange.stateOf(0) == Peer::State::kGone);
  CHECK_EQUAL(pair.b.ended.size(), 1U);
}

TEST(exchange_a_peer_that_leaves_without_sending_the_rest_is_gone_after_a_while) {
  LeavingPair pair;
  pair.b.exchange.look(*pair.b.hold, pair.left + std::chrono::milliseconds(600));
  CHECK_THAT(pair.b.exchange.stateOf(0) == Peer::State::kLeaving);
  pair.b.exchange.look(*pair.b.hold, pair.left + std::chrono::milliseconds(900));
  CHECK_THAT(pair.b.exchange.stateOf(0) == Peer::State::kGone);
  CHECK_THAT(pair.b.exchange.quiet(*pair.b.hold));
}

// A frame grants credit, what waited for it fails as it is sent, and the frame has parts: none of them is received.
TEST(exchange_a_peer_that_fails_while_its_frame_is_read_sends_nothing_more) {
  auto options = Pair::smallOptions();
  options.windowRequests = 1;
  Pair pair(options);
  pair.network->eagerBytes = 100000;
  pair.a.post(smallRequest("first"));
  pair.a.post(smallRequest("waits"));
  pair.settle();
  pair.b.exchange.released(0, pair.b.charged[0]);
  pair.b.post(std::make_unique<TextMessage>(0, FrameKind::kResponse, "x", std::vector<std::string>{pattern(5000, 1)}));
  pair.a.transport.sendsFail = true;
  pair.settle();
  CHECK_EQUAL(pair.a.ended.size(), 1U);
  CHECK_EQUAL(pair.a.bodies.size(), 0U);
  CHECK_THAT(pair.a.exchange.quiet(*pair.a.hold));
}

TEST(exchange_a_frame_of_no_known_rank_is_told) {
  Pair pair;
  OperationStatus status;
  status.error = "MPI_ERR_OTHER";
  pair.b.transport.fail(*pair.b.hold, status);
  CHECK_EQUAL(pair.b.strayFrames.size(), 1U);
  CHECK_EQUAL(pair.b.strayFrames[0], "-1: MPI_ERR_OTHER");
  pair.a.post(request("still works"));
  pair.settle();
  CHECK_EQUAL(pair.b.bodies.size(), 1U);
}

TEST(exchange_errors_without_end_that_name_no_peer_break_the_transport) {
  Pair pair;
  OperationStatus status;
  status.error = "MPI_ERR_OTHER";
  std::atomic<Clock::rep> time{0};
  Clock::simulate(&time);
  int errors = 0;
  const auto failOnce = [&] {
    ++errors;
    time += std::chrono::nanoseconds(std::chrono::milliseconds(50)).count();
    pair.b.transport.fail(*pair.b.hold, status);
    return pair.b.exchange.poll(*pair.b.hold);
  };
  const auto failOn = [&] {
    while (errors < 1000 && !failOnce()) {
    }
    return errors;
  };
  CHECK_THROWS(failOn(), "frames can no longer be received: MPI_ERR_OTHER");
  Clock::simulate(nullptr);
  CHECK_THAT(errors > 1);
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
  pair.a.post(smallRequest("sent"));
  pair.a.post(smallRequest("waits"));
  pair.a.exchange.fail(*pair.a.hold, 1, "it left");
  pair.a.post(smallRequest("late"));
  pair.settle();
  CHECK_EQUAL(pair.a.failures, 2);
  CHECK_EQUAL(TextMessage::lastFailure, "peer 1: it left");
  CHECK_EQUAL(pair.a.exchange.counters().waitingForCredit, 0U);
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
  network->counts = false; // all is sent at once
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
