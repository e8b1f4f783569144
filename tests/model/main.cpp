// Explores the model of the engine, then again with each defect that it is to find. Arguments: --large explores more
// and takes minutes; --traces prints how each defect shows.
#include <array>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "model/engine_model.h"
#include "model/explorer.h"

namespace {

using model::Caller;
using model::Mutation;
using model::Outcome;
using model::Peer;
using model::Setup;

std::vector<Setup> setups() {
  return {
      {.name = "a call of its own", .callers = {Caller::kCallsItself}},
      {.name = "a request", .requests = 1},
      {.name = "a request, one core to spare", .engineThreads = 3, .requests = 1, .oneCore = true},
      {.name = "two requests", .engineThreads = 4, .requests = 2},
      {.name = "two requests, the first waits for the second",
       .engineThreads = 4,
       .requests = 2,
       .waits = model::kFirstRequest},
      {.name = "two requests, the first calls, the second waits for it",
       .engineThreads = 3,
       .requests = 2,
       .innerCall = true,
       .waits = model::kSecondRequest},
      {.name = "a call", .callers = {Caller::kWaits}},
      {.name = "two calls", .callers = {Caller::kWaits, Caller::kWaits}},
      {.name = "a call, and a request that waits for it",
       .callers = {Caller::kWaits},
       .requests = 1,
       .waits = model::kFirstRequest},
      {.name = "a request that calls, two threads", .requests = 1, .innerCall = true},
      {.name = "a call and a request", .callers = {Caller::kWaits}, .requests = 1},
      {.name = "a call and two requests", .callers = {Caller::kWaits}, .requests = 2},
      {.name = "a request that calls", .engineThreads = 4, .requests = 1, .innerCall = true},
      {.name = "a guest", .callers = {Caller::kDrives}},
      {.name = "a guest and a request", .callers = {Caller::kDrives}, .requests = 1},
      {.name = "stop, a call and a request", .callers = {Caller::kWaits}, .requests = 1, .stops = true},
      {.name = "stop, a call of its own", .callers = {Caller::kCallsItself}, .stops = true},
      {.name = "stop, a guest", .callers = {Caller::kDrives}, .stops = true},
      {.name = "stop, a request that calls", .engineThreads = 3, .requests = 1, .innerCall = true, .stops = true},
      {.name = "the peer leaves, a call", .callers = {Caller::kWaits}, .peer = Peer::kLeaves},
      {.name = "the peer leaves, a guest", .callers = {Caller::kDrives}, .peer = Peer::kLeaves},
      {.name = "the peer fails, a call and a request",
       .callers = {Caller::kWaits},
       .requests = 1,
       .peer = Peer::kFails},
      {.name = "the peer fails, a guest", .callers = {Caller::kDrives}, .peer = Peer::kFails},
      {.name = "the peer fails, a request that calls",
       .engineThreads = 3,
       .requests = 1,
       .innerCall = true,
       .peer = Peer::kFails},
      {.name = "stop, and the peer fails", .callers = {Caller::kWaits}, .stops = true, .peer = Peer::kFails},
      {.name = "the transport breaks, a call and a request",
       .callers = {Caller::kWaits},
       .requests = 1,
       .breaks = true},
      {.name = "the transport breaks, a guest", .callers = {Caller::kDrives}, .breaks = true},
  };
}

std::vector<Setup> largeSetups() {
  return {
      {.name = "two calls and a request", .callers = {Caller::kWaits, Caller::kWaits}, .requests = 1},
      {.name = "a call and a request, three threads", .engineThreads = 3, .callers = {Caller::kWaits}, .requests = 1},
      {.name = "a guest and a request, three threads",
       .engineThreads = 3,
       .callers = {Caller::kDrives},
       .requests = 1,
       .oneCore = true},
      {.name = "a guest and a call", .callers = {Caller::kDrives, Caller::kWaits}},
      {.name = "two guests", .callers = {Caller::kDrives, Caller::kDrives}},
      {.name = "a guest and a call of its own", .engineThreads = 3, .callers = {Caller::kDrives, Caller::kCallsItself}},
      {.name = "stop, a guest and a call of its own",
       .callers = {Caller::kDrives, Caller::kCallsItself},
       .stops = true},
      {.name = "the peer leaves, a call and a request",
       .callers = {Caller::kWaits},
       .requests = 1,
       .peer = Peer::kLeaves},
      {.name = "the peer fails, a guest and a call",
       .callers = {Caller::kDrives, Caller::kWaits},
       .peer = Peer::kFails},
  };
}

struct Defect {
  Mutation mutation;
  const char* name;
  const char* setups; // where it may show: a part of their names
};

constexpr std::array kDefects{
    Defect{Mutation::kRingUnordered, "ring() looks for sleepers before what was sent is seen", ""},
    Defect{Mutation::kPrepareUnordered, "prepare() counts a sleeper after its second look", ""},
    Defect{Mutation::kNoSecondLook, "no second look before the sleep", ""},
    Defect{Mutation::kLateTicket, "the ticket is taken after the second look", ""},
    Defect{Mutation::kRingUncounted, "ring() wakes, but does not count", ""},
    Defect{Mutation::kSleepDropsToken, "sleep() drops the token without a look at the queue", ""},
    Defect{Mutation::kSubmitDropsToken, "submitted() drops the token without a look at the queue", "requests"},
    Defect{Mutation::kSubmitLeavesQueued, "submitted() leaves what is queued to nobody", "requests"},
    Defect{Mutation::kPostSilent, "post() does not ring", ""},
    Defect{Mutation::kStopSilent, "stop() does not ring", "stop"},
    Defect{Mutation::kTakeSilent, "take() wakes nobody to lead", "request"},
    Defect{Mutation::kTakesLastThread, "take() leaves no thread to lead", "request"},
    Defect{Mutation::kLastTakesNothing, "take() does not even let the last thread run a completion", "request"},
    Defect{Mutation::kParksForGuest, "standBy() parks while a guest leads", "guest and a request"},
    Defect{Mutation::kPostAfterStop, "post() queues after stop()", "stop"},
    Defect{Mutation::kResponseKeepsCall, "a response leaves its call in the table", "stop"},
    Defect{Mutation::kGoneCallsForgotten, "the calls of a peer that is gone stay in the table", "peer leaves"},
    Defect{Mutation::kGoneStillSent, "the exchange sends to a peer that is gone", "peer leaves"},
    Defect{Mutation::kGoneTwice, "a peer's end counts again after its goodbye", "peer leaves"},
    Defect{
        Mutation::kQueuesLate, "the token is released before what a turn has yielded is queued",
        "call and two requests"},
    Defect{Mutation::kBrokenArrivalsLost, "a turn that throws keeps what arrived in it", "breaks"},
};

void print(const std::vector<std::string>& trace) {
  for (const std::string& step : trace) {
    std::printf("    %s\n", step.c_str());
  }
}

Outcome explore(const Setup& setup, Mutation mutation) {
  model::EngineModel model(setup, mutation);
  return model::Explorer(model).explore();
}

bool holds(const std::vector<Setup>& all) {
  std::printf("%9s  the engine\n", "states");
  bool good = true;
  for (const Setup& setup : all) {
    const Outcome outcome = explore(setup, Mutation::kNone);
    good = good && outcome.violation.empty();
    std::printf(
        "%9zu  %s: %s\n", outcome.states, setup.name, outcome.violation.empty() ? "holds" : outcome.violation.c_str());
    print(outcome.trace);
    std::fflush(stdout);
  }
  return good;
}

bool findsAll(const std::vector<Setup>& all, bool traces) {
  std::printf("\n%9s  defects\n", "states");
  bool good = true;
  for (const Defect& defect : kDefects) {
    size_t states = 0;
    Outcome outcome;
    const char* where = "";
    for (const Setup& setup : all) {
      if (std::strstr(setup.name, defect.setups) == nullptr) {
        continue;
      }
      outcome = explore(setup, defect.mutation);
      states += outcome.states;
      where = setup.name;
      if (!outcome.violation.empty()) {
        break;
      }
    }
    const bool found = !outcome.violation.empty();
    good = good && found;
    if (found) {
      std::printf("%9zu  %s\n%9s    %s: %s\n", states, defect.name, "", where, outcome.violation.c_str());
    } else {
      std::printf("%9zu  %s\n%9s    NOT FOUND\n", states, defect.name, "");
    }
    if (traces) {
      print(outcome.trace);
    }
    std::fflush(stdout);
  }
  return good;
}

} // namespace

int main(int argc, char** argv) {
  bool large = false;
  bool traces = false;
  for (int i = 1; i < argc; ++i) {
    large = large || std::strcmp(argv[i], "--large") == 0;
    traces = traces || std::strcmp(argv[i], "--traces") == 0;
  }
  const std::vector<Setup> all = setups();
  bool good = holds(all);
  if (large) {
    good = holds(largeSetups()) && good;
  }
  good = findsAll(all, traces) && good;
  return good ? 0 : 1;
}
