// Peers that do not take what they are sent.
#include "peer/window.h"

#include "check.h"
#include "exchange_rank.h"

using namespace torch_rpc_mpi;
using namespace torch_rpc_mpi::testing;

namespace {

constexpr int kFlood = 100; // messages, many more than a host has cells

struct Host {
  explicit Host(int size, std::shared_ptr<FakeNetwork> wires = nullptr)
      : network(wires != nullptr ? std::move(wires) : std::make_shared<FakeNetwork>(size)) {
    for (int rank = 0; rank < size; ++rank) {
      ranks.push_back(std::make_unique<Rank>(network, rank, Pair::smallOptions()));
    }
  }
  Rank& sender() {
    return *ranks[0];
  }
  // Posts so many, and returns how many were sent.
  int flood(int peer, FrameKind kind = FrameKind::kResponse) {
    const int before = sender().transport.sends;
    for (int i = 0; i < kFlood; ++i) {
      auto message = std::make_unique<TextMessage>(peer, kind, std::to_string(i));
      message->header().chargedBytes = 0;
      sender().post(std::move(message));
    }
    return sender().transport.sends - before;
  }
  void settle(int first = 0) {
    bool moved = true;
    while (moved) {
      moved = sender().poll();
      for (size_t rank = std::max(first, 1); rank < ranks.size(); ++rank) {
        moved = ranks[rank]->poll() || moved;
      }
    }
  }
  bool hasAll(int rank) const {
    const auto& bodies = ranks[rank]->bodies;
    for (int i = 0; i < static_cast<int>(bodies.size()); ++i) {
      CHECK_EQUAL(bodies[i], std::to_string(i % kFlood));
    }
    return bodies.size() == kFlood;
  }
  const std::shared_ptr<FakeNetwork> network;
  std::vector<std::unique_ptr<Rank>> ranks;
};

} // namespace

TEST(window_a_peer_that_takes_nothing_holds_few_messages_and_gets_the_rest_when_it_goes_on) {
  for (const FrameKind kind : {FrameKind::kRequest, FrameKind::kResponse}) {
    Host host(2);
    CHECK_EQUAL(host.flood(1, kind), 16);
    for (int i = 0; i < 5; ++i) {
      host.sender().poll();
    }
    CHECK_EQUAL(host.sender().transport.sends, 16);
    CHECK_THAT(!host.sender().exchange.quiet(*host.sender().hold));
    host.settle();
    CHECK_THAT(host.hasAll(1));
    CHECK_THAT(host.sender().exchange.quiet(*host.sender().hold));
  }
}

TEST(window_peers_that_take_nothing_leave_enough_to_the_others) {
  Host host(8);
  CHECK_EQUAL(host.flood(1), 16);
  CHECK_EQUAL(host.flood(2), 11);
  CHECK_EQUAL(host.flood(3), 7);
  CHECK_EQUAL(host.flood(4), 5);
  for (const int peer : {5, 6, 7}) {
    CHECK_EQUAL(host.flood(peer), 3);
    host.settle(5);
    CHECK_THAT(host.hasAll(peer));
  }
  host.settle();
  for (int peer = 1; peer < 8; ++peer) {
    CHECK_THAT(host.hasAll(peer));
  }
}

TEST(window_each_of_very_many_peers_that_take_nothing_leaves_one_message_to_the_others) {
  constexpr int kStopped = 20;
  Host host(kStopped + 2);
  int sent = 0;
  for (int peer = 1; peer <= kStopped; ++peer) {
    sent += host.flood(peer);
  }
  CHECK_THAT(sent < 60);
  host.flood(kStopped + 1);
  host.settle(kStopped + 1);
  CHECK_THAT(host.hasAll(kStopped + 1));
}

// What lies with many peers that have taken all, unknown to the sender, is found out when it matters.
TEST(window_peers_that_have_taken_all_count_for_nothing) {
  Host host(64);
  for (int peer = 1; peer < 63; ++peer) {
    host.sender().post(std::make_unique<TextMessage>(peer, FrameKind::kResponse, "x"));
    host.ranks[peer]->poll();
  }
  CHECK_EQUAL(host.flood(63), 16);
}

TEST(window_a_dead_peer_keeps_what_it_has_and_its_waiting_messages_fail) {
  Host host(3);
  host.flood(1);
  host.sender().exchange.fail(*host.sender().hold, 1, "it crashed");
  host.sender().poll();
  CHECK_EQUAL(host.sender().failures, kFlood - 16);
  CHECK_EQUAL(TextMessage::lastFailure, "peer 1: it crashed");
  CHECK_THAT(host.sender().exchange.quiet(*host.sender().hold));
  CHECK_EQUAL(host.flood(2), 11);
  host.settle(2);
  CHECK_THAT(host.hasAll(2));
}

TEST(window_bounds_chunks_that_are_complete_at_once) {
  Host host(2);
  host.network->eagerBytes = 100000;
  host.sender().post(
      std::make_unique<TextMessage>(
          1, FrameKind::kResponse, "x", std::vector<std::string>{pattern(50000, 1)})); // of 1000
  host.sender().poll();
  CHECK_EQUAL(host.sender().transport.sends, 1 + 16);
  host.settle();
  CHECK_THAT(host.ranks[1]->parts[0][0] == pattern(50000, 1));
}

TEST(window_requests_and_answers_that_wait_take_turns) {
  Host host(2);
  host.flood(1, FrameKind::kRequest);
  for (int i = 0; i < kFlood; ++i) {
    host.sender().post(std::make_unique<TextMessage>(1, FrameKind::kResponse, "answer"));
  }
  host.settle();
  const auto& bodies = host.ranks[1]->bodies;
  const auto answers = std::count(bodies.begin() + 16, bodies.begin() + 116, "answer");
  CHECK_EQUAL(answers, 50);
  CHECK_EQUAL(bodies.size(), 2U * kFlood);
}

TEST(window_what_waited_goes_in_batches) {
  Host host(2);
  host.flood(1);
  host.ranks[1]->poll();
  host.sender().poll();
  CHECK_THAT(host.sender().transport.sends < 16 + 10);
  host.ranks[1]->poll();
  CHECK_THAT(host.hasAll(1));
  CHECK_EQUAL(host.sender().exchange.counters().framesSent, static_cast<uint64_t>(kFlood));
  CHECK_EQUAL(host.ranks[1]->exchange.counters().framesReceived, static_cast<uint64_t>(kFlood));
}

TEST(window_what_waited_keeps_its_order_whatever_its_size) {
  Host host(2);
  host.flood(1);
  for (int i = 0; i < 5; ++i) {
    host.sender().post(
        std::make_unique<TextMessage>(
            1, FrameKind::kResponse, "with a part", std::vector<std::string>{pattern(2500, i)}));
    host.sender().post(std::make_unique<TextMessage>(1, FrameKind::kResponse, pattern(3000, i)));
    auto bad = std::make_unique<TextMessage>(1, FrameKind::kResponse, "bad");
    bad->refuseToEncode = true;
    host.sender().post(std::move(bad));
    host.sender().post(std::make_unique<TextMessage>(1, FrameKind::kResponse, "small"));
  }
  host.settle();
  CHECK_EQUAL(host.sender().failures, 5);
  CHECK_EQUAL(TextMessage::lastFailure, "cannot be encoded");
  const auto& bodies = host.ranks[1]->bodies;
  CHECK_EQUAL(bodies.size(), kFlood + 15U);
  CHECK_EQUAL(std::count(bodies.begin(), bodies.end(), "small"), 5);
  std::vector<std::string> large;
  std::copy_if(
      bodies.begin(), bodies.end(), std::back_inserter(large), [](const auto& body) { return body.size() == 3000; });
  for (int i = 0; i < 5; ++i) {
    CHECK_THAT(large[i] == pattern(3000, i));
  }
}

TEST(window_a_request_that_nobody_waits_for_is_not_sent) {
  Host host(2);
  host.flood(1, FrameKind::kRequest); // all of one call's id, of which the last is found
  const OutboundPtr unsent = host.sender().exchange.forget(*host.sender().hold, 1, 7);
  CHECK_THAT(unsent != nullptr);
  host.sender().poll();
  CHECK_EQUAL(host.sender().sent, 16U);
  CHECK_EQUAL(host.sender().exchange.counters().waitingForCredit, kFlood - 17U);
  host.settle();
  CHECK_EQUAL(host.ranks[1]->bodies.size(), kFlood - 1U);
}

TEST(window_a_request_that_was_sent_is_called_off) {
  Pair pair;
  pair.a.post(smallRequest("sent"));
  CHECK_THAT(pair.a.exchange.forget(*pair.a.hold, 1, 7) == nullptr);
  pair.settle();
  CHECK_EQUAL(pair.b.kinds.size(), 2U);
  CHECK_THAT(pair.b.kinds.back() == FrameKind::kForget);
}

TEST(window_a_goodbye_reaches_also_a_peer_that_takes_nothing) {
  Host host(2);
  host.flood(1);
  host.sender().post(std::make_unique<TextMessage>(1, FrameKind::kGoodbye, "bye"));
  host.sender().exchange.close(*host.sender().hold, /*agreed=*/false);
  host.ranks[1]->poll();
  CHECK_EQUAL(host.ranks[1]->bodies.size(), 17U);
  CHECK_EQUAL(host.ranks[1]->bodies.back(), "bye");
}

TEST(window_a_sender_that_waits_is_woken) {
  Host host(2);
  host.flood(1);
  Doorbell bell(host.sender().transport.bell());
  const uint32_t ticket = bell.prepare();
  host.ranks[1]->poll();
  CHECK_THAT(bell.wait(ticket, std::chrono::hours(1)));
}

TEST(window_does_not_bound_what_goes_to_other_hosts) {
  Host host(2);
  host.network->counts = false;
  CHECK_EQUAL(host.flood(1), kFlood);
}
