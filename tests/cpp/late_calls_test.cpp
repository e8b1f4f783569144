#include "agent/late_calls.h"

#include <optional>

#include "agent/running_requests.h"
#include "check.h"

using namespace torch_rpc_mpi;

namespace {

ConstSpan spanOf(const std::string& bytes) {
  return {bytes.data(), bytes.size()};
}

LateCall inState(LateCall::State state) {
  LateCall call;
  call.state = state;
  call.before = 3;
  call.seconds = 1.5;
  return call;
}

std::vector<std::string> namesOf(const RunningRequests& all) {
  std::vector<std::string> names;
  all.forEach([&](const RunningRequests::Request& request) { names.emplace_back(request.function()); });
  return names;
}

// Whether that call is found, and has a thread or has returned a future.
std::string found(const RunningRequests& all, int peer, uint64_t id) {
  std::string state = "nowhere";
  all.find(
      peer, id, [&](const RunningRequests::Request& request) { state = request.promised() ? "promised" : "runs"; });
  return state;
}

} // namespace

TEST(late_calls_frames_are_read_as_they_were_written) {
  const std::vector<uint64_t> ids{1, UINT64_MAX};
  CHECK_THAT(readInquiry(spanOf(writeInquiry(ids))) == ids);
  CHECK_THAT(readInquiry({}).empty());
  Statement statement;
  statement.business.workerThreads = 4;
  statement.business.oldest = {'f'};
  statement.calls = {inState(LateCall::State::kQueued), inState(LateCall::State::kRunning)};
  const std::string bytes = writeStatement(statement);
  const Statement read = readStatement(spanOf(bytes));
  CHECK_EQUAL(read.business.workerThreads, 4U);
  CHECK_EQUAL(read.calls.size(), 2U);
  CHECK_THAT(read.calls[1].state == LateCall::State::kRunning);
}

TEST(late_calls_frames_of_other_sizes_make_no_sense) {
  const std::string statement = writeStatement({});
  for (size_t bytes = 0; bytes < statement.size(); ++bytes) {
    CHECK_THROWS(readStatement({statement.data(), bytes}), "bytes");
  }
  CHECK_THROWS(readInquiry({statement.data(), 7}), "7 bytes");
  const std::string tooMany((kLateCallsAsked + 1) * sizeof(uint64_t), '\0');
  CHECK_THROWS(readInquiry(spanOf(tooMany)), "bytes");
}

TEST(late_calls_words_say_what_the_callee_does) {
  Business business;
  business.workerThreads = 2;
  business.running = 2;
  business.waiting = 1;
  business.oldestSeconds = 12;
  std::copy_n("module.f", 8, business.oldest.begin());
  const auto words = [&](LateCall::State state) { return whyLate("worker1", business, inState(state)); };
  CHECK_THAT(
      words(LateCall::State::kQueued)
          .find(
              "On worker1 it waits behind 3 other requests: all its 2 worker threads are busy, the oldest in module.f "
              "for 12 s") != std::string::npos);
  CHECK_THAT(words(LateCall::State::kQueued).find("num_worker_threads") == std::string::npos);
  business.waiting = 2;
  CHECK_THAT(words(LateCall::State::kQueued).find("num_worker_threads") != std::string::npos);
  CHECK_THAT(words(LateCall::State::kRunning).find("running on worker1 for 1.50 s") != std::string::npos);
  CHECK_THAT(words(LateCall::State::kPromised).find("returned a future") != std::string::npos);
  CHECK_THAT(words(LateCall::State::kArriving).find("still on their way to worker1") != std::string::npos);
  CHECK_THAT(
      words(static_cast<LateCall::State>(77)).find("answered by worker1") !=
      std::string::npos); // from a newer worker, say
}

TEST(running_requests_are_seen_in_their_order_with_their_functions) {
  const auto all = std::make_shared<RunningRequests>();
  RunningRequests::nameFunction("m", "of no request");
  {
    const RunningRequests::Request first(*all, 1, 10);
    RunningRequests::nameFunction("module", "function");
    RunningRequests::nameFunction("module", "called by that"); // the first is what was asked for
    RunningRequests::Request promised(first);
    CHECK_THAT(promised.promised());
    CHECK_THAT(promised.since() == first.since());
    CHECK_THAT((namesOf(*all) == std::vector<std::string>{"module.function", "module.function"}));
    CHECK_EQUAL(found(*all, 1, 10), std::string("promised"));
    CHECK_EQUAL(found(*all, 2, 10), std::string("nowhere"));
    promised.end();
    CHECK_EQUAL(namesOf(*all).size(), 1U);
    CHECK_EQUAL(found(*all, 1, 10), std::string("runs"));
    promised.end();
  }
  CHECK_THAT(namesOf(*all).empty());
  const RunningRequests::Request next(*all, 1, 11);
  RunningRequests::nameFunction({}, std::string(1000, 'x'));
  CHECK_EQUAL(namesOf(*all)[0], std::string(80, 'x'));
}

TEST(running_requests_whose_functions_returned_futures_are_not_the_oldest) {
  const auto all = std::make_shared<RunningRequests>();
  std::optional<RunningRequests::Request> first(std::in_place, *all, 1, 10);
  const RunningRequests::Request promised(*first);
  first.reset();
  uint64_t oldest = 0;
  const auto look = [&](const RunningRequests::Request& request) { oldest = request.callId(); };
  all->oldest(look);
  CHECK_EQUAL(oldest, 0U);
  const RunningRequests::Request next(*all, 1, 11);
  all->oldest(look);
  CHECK_EQUAL(oldest, 11U);
  CHECK_EQUAL(found(*all, 1, 10), std::string("promised"));
}
