#include "agent/losses.h"

#include <new>
#include <utility>

#include <c10/util/Logging.h>

#include "agent/farewell.h"
#include "agent/loss_news.h"
#include "host/other_process.h"
#include "peer/outbound_control.h"

namespace torch_rpc_mpi {

namespace {

// What a process had sent before it ended, a goodbye perhaps, has so long to arrive.
constexpr auto kLastWords = std::chrono::milliseconds(100);
// So long what a lost peer held is kept: see Note [What the lost held].
constexpr auto kLastRequests = std::chrono::seconds(1);
// Where this rank waits for the verdict on a graceful shutdown, a process that ends has probably had it, and it is the
// verdict that is late: the rank that passes it on may be without a core. One that has crashed instead is told of by
// those that still waited for its report.
constexpr auto kLateVerdict = std::chrono::milliseconds(500);

} // namespace

Losses::Losses(
    Transport& transport,
    Membership& members,
    Exchange& exchange,
    Server& server,
    Join& join,
    std::chrono::milliseconds interval)
    : transport_(transport),
      members_(members),
      exchange_(exchange),
      server_(server),
      join_(join),
      interval_(interval) {
  lost_.reserve(transport.size()); // each is lost once, and then there may be no memory
}

void Losses::look(ProgressToken& token, Clock::time_point now) {
  nextLook_ = now + interval_;
  for (const int peer : transport_.takeEnded(token)) {
    ended_.push_back({peer, now});
  }
  const auto patience = join_.awaitsVerdict() ? kLateVerdict : kLastWords;
  std::erase_if(ended_, [&](const Ended& ended) {
    if (now - ended.found < patience) {
      return false;
    }
    if (watch_ != nullptr && exchange_.stateOf(ended.peer) == Peer::State::kOpen &&
        watch_->speaksFor(ended.peer, [&](int peer) { return exchange_.stateOf(peer) == Peer::State::kOpen; })) {
      tellOthers(token, {ended.peer, Watch::Kind::kEnded, kEndedWithoutLeaving});
    }
    exchange_.fail(token, ended.peer, kEndedWithoutLeaving);
    return true;
  });
}

// At once: one that leaves has said so where its end was seen. And the less MPI touches one that has ended, the better.
void Losses::failFound(ProgressToken& token) {
  for (const Watch::Finding& finding : watch_->takeFindings()) {
    if (finding.kind == Watch::Kind::kUnreachable) {
      LOG(WARNING) << "RPC on " << members_.describe(members_.rank()) << " cannot watch "
                   << members_.describe(finding.rank) << ": " << finding.text
                   << ". If that one dies or its host is gone, calls to it wait for their timeouts";
    } else if (exchange_.stateOf(finding.rank) == Peer::State::kOpen) {
      tellOthers(token, finding);
      exchange_.fail(token, finding.rank, finding.text);
    }
  }
}

// One that is silent is told too, should it go on: nobody will talk to it any more. One that has ended must not be
// touched, which MPI may not survive.
void Losses::tellOthers(ProgressToken& token, const Watch::Finding& lost) try {
  const std::string body = writeLossNews({lost.rank, lost.text});
  for (int peer = 0; peer < transport_.size(); ++peer) {
    const bool touched = peer != members_.rank() && (peer != lost.rank || lost.kind == Watch::Kind::kSilent);
    if (touched && exchange_.stateOf(peer) == Peer::State::kOpen) {
      exchange_.post(token, std::make_unique<OutboundControl>(peer, FrameKind::kLost, body));
    }
  }
} catch (const std::bad_alloc&) { // they find out, or not; that this rank does comes first
}

void Losses::onGoodbye(ProgressToken& token, int source, ConstSpan body) {
  const Farewell said = readFarewell(body);
  std::string farewell = said.text;
  if (!said.cause.empty()) {
    farewell += ", after it had lost another worker: " + said.cause;
    causes_.emplace(source, said.cause);
  }
  exchange_.leaves(token, source, "it has left (" + farewell + ")", Clock::now());
}

void Losses::onNews(ProgressToken& token, int source, ConstSpan body) {
  const LossNews news = readLossNews(body, transport_.size());
  if (news.rank != members_.rank()) {
    exchange_.fail(token, news.rank, news.text + ", as " + members_.describe(source) + " has found");
    return;
  }
  const std::string cause = "this worker was given up by " + members_.describe(source) + " and so by all: " + news.text;
  for (int peer = 0; peer < transport_.size(); ++peer) {
    if (peer != members_.rank()) {
      exchange_.fail(token, peer, cause);
    }
  }
}

const std::string& Losses::onPeerEnded(int peer, const std::string& reason) {
  const auto found = causes_.find(peer);
  const std::string& cause = found == causes_.end() ? reason : found->second;
  members_.lose(peer, reason, cause);
  if (watch_ != nullptr) {
    watch_->forget(peer);
  }
  lost_.push_back({peer, Clock::now()});
  return cause;
}

void Losses::addLastMessagesOfSome(Clock::time_point now, std::vector<TaskPtr>& tasks) {
  std::erase_if(lost_, [&](const Ended& lost) {
    if (now - lost.found < kLastRequests) {
      return false;
    }
    tasks.push_back(server_.lastMessagesOf(lost.peer));
    return true;
  });
}

} // namespace torch_rpc_mpi
