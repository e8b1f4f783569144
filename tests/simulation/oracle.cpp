#include "oracle.h"

#include <algorithm>
#include <utility>

#include "trace.h"

namespace torch_rpc_mpi::simulation {

namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

} // namespace

Oracle::Oracle(int size)
    : size_(size),
      excused_(static_cast<size_t>(size) * size, false),
      dead_(size, false),
      stops_(size, false),
      shortOfMemory_(size, false),
      reasons_(excused_.size()) {}

std::string Oracle::describe(int rank) {
  return "worker '" + nameOf(rank) + "' (rank " + std::to_string(rank) + " on host host" + std::to_string(rank) + ")";
}

void Oracle::excuse(int a, int b) {
  excused_[static_cast<size_t>(a) * size_ + b] = true;
  excused_[static_cast<size_t>(b) * size_ + a] = true;
}

void Oracle::excuseRank(int rank) {
  for (int other = 0; other < size_; ++other) {
    excuse(rank, other);
  }
}

Call& Oracle::made(Call call) {
  call.index = static_cast<int>(calls_.size());
  trace().note("call", call.index, call.from, call.to);
  return calls_.emplace_back(std::move(call));
}

void Oracle::served(int index) {
  trace().note("serves", index);
  if (++call(index).served > 1) {
    trace().fail(wordsOf(call(index)) + " was run twice");
  }
}

std::string Oracle::wordsOf(const Call& call) const {
  return "call " + std::to_string(call.index) + " (" + static_cast<char>(call.function) + ") of rank " +
      std::to_string(call.from) + " to rank " + std::to_string(call.to);
}

bool Oracle::hasExcuse(const Call& call) const {
  return excused(call.from, call.to) || (call.inner >= 0 && hasExcuse(calls_[call.inner]));
}

bool Oracle::mayFailWith(const Call& call, const std::string& error) const {
  if (contains(error, "Calls to it can no longer be answered")) {
    const std::string& reason = reasonOf(call.from, call.to);
    return excused(call.from, call.to) && (wordsFail_ || (error == reason && contains(error, describe(call.to))));
  }
  if (contains(error, "RPC ran for more than set timeout")) {
    return call.shortTimeout || hasExcuse(call) || (call.mayFail && call.function == Function::kNested) ||
        needs(call, [this](int rank) { return stops_[rank]; });
  }
  if (contains(error, "the function failed")) {
    return call.mayFail && contains(error, nameOf(call.to));
  }
  return call.mayFail || excused(call.from, call.to);
}

void Oracle::completed(int index, const std::string& error) {
  Call& call = calls_.at(index);
  if (contains(error, "Calls to it can no longer be answered") && !contains(error, "the function failed")) {
    lost(call.from, call.to, error); // perhaps the first to tell
  }
  trace().note(error.empty() ? "answered" : "failed", index);
  if (++call.completed > 1) {
    trace().fail(wordsOf(call) + " completes twice");
  }
  if (error.empty()) {
    if (call.served != 1) {
      trace().fail(wordsOf(call) + " was answered, but not run");
    }
    if (call.function == Function::kThrow) {
      trace().fail(wordsOf(call) + " succeeds although its function threw");
    }
  } else if (!mayFailWith(call, error)) {
    trace().fail(wordsOf(call) + " fails without a reason: " + error);
  }
}

void Oracle::refused(int index, const std::string& error, bool mayBe) {
  Call& call = calls_.at(index);
  trace().note("refused", index);
  ++call.completed;
  if (!mayBe) {
    trace().fail(wordsOf(call) + " could not be made: " + error);
  }
}

void Oracle::lost(int at, int rank, const std::string& reason) {
  std::string& known = reasons_[static_cast<size_t>(at) * size_ + rank];
  if (!known.empty() && known != reason) {
    trace().fail("rank " + std::to_string(at) + " gives another reason than the first: " + known + " / " + reason);
  }
  if (!known.empty()) {
    return;
  }
  trace().note("has lost", at, rank);
  known = reason;
  if (!contains(reason, describe(rank)) && !wordsFail_) {
    trace().fail("the loss of rank " + std::to_string(rank) + " is not told by its name: " + reason);
  }
  if (!excused(at, rank)) {
    trace().fail(
        "rank " + std::to_string(at) + " has lost rank " + std::to_string(rank) + " without a reason: " + reason);
  }
}

bool Oracle::needs(const Call& call, const std::function<bool(int rank)>& of) const {
  return of(call.from) || of(call.to) || (call.inner >= 0 && needs(calls_[call.inner], of));
}

size_t Oracle::pendingWithoutExcuse(const std::function<bool(int rank)>& without) const {
  return static_cast<size_t>(std::ranges::count_if(calls_, [&](const Call& call) {
    return pending(call) && !hasExcuse(call) && !dead_[call.from] && !needs(call, without);
  }));
}

size_t Oracle::pendingOf(int rank) const {
  return static_cast<size_t>(
      std::ranges::count_if(calls_, [&](const Call& call) { return pending(call) && call.from == rank; }));
}

std::string Oracle::aPendingCall() const {
  const auto found = std::ranges::find_if(calls_, [&](const Call& call) { return pending(call) && !dead_[call.from]; });
  return found == calls_.end() ? "none" : wordsOf(*found);
}

void Oracle::checkAllCompleted() const {
  for (const Call& call : calls_) {
    if (call.completed == 0) {
      trace().fail(wordsOf(call) + " has never completed");
    }
  }
}

} // namespace torch_rpc_mpi::simulation
