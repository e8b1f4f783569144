// What must hold whatever happens, and what a fault excuses.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

namespace torch_rpc_mpi::simulation {

// What the callee's function does.
enum class Function : char {
  kEcho = 'e',
  kThrow = 't',
  kHold = 'h',    // answers later
  kNested = 'n',  // calls another worker, and answers when that has
  kNoMemory = 'm' // there is none for the response
};

struct Call {
  int index = 0, from = 0, to = 0;
  Function function = Function::kEcho;
  bool shortTimeout = false;
  int depth = 0;
  size_t padding = 0;               // bytes of payload
  std::vector<size_t> tensors = {}; // their bytes
  bool mayFail = false;             // what its function does goes wrong
  int inner = -1;                   // the call that its function made
  int served = 0, completed = 0;
};

class Oracle {
 public:
  explicit Oracle(int size);

  static std::string nameOf(int rank) {
    return "worker" + std::to_string(rank);
  }
  static std::string describe(int rank);

  // Something has gone wrong between two ranks, or with all that concerns one: that may fail now.
  void excuse(int a, int b);
  void excuseRank(int rank);
  bool excused(int a, int b) const {
    return excused_[static_cast<size_t>(a) * size_ + b];
  }
  // A rank that was short of memory: its words may be cut, also those that others repeat.
  void shortOfMemory(int rank) {
    excuseRank(rank);
    shortOfMemory_[rank] = true;
    wordsFail_ = true;
  }
  bool isShortOfMemory(int rank) const {
    return shortOfMemory_[rank];
  }
  bool wordsFail() const {
    return wordsFail_;
  }
  // A rank of which nothing more is expected.
  void dead(int rank) {
    excuseRank(rank);
    dead_[rank] = true;
  }
  // A rank that may be late.
  void stops(int rank) {
    stops_[rank] = true;
  }
  bool isDead(int rank) const {
    return dead_[rank];
  }

  Call& made(Call call); // gives it its index
  Call& call(int index) {
    return calls_.at(index);
  }
  size_t callsMade() const {
    return calls_.size();
  }
  void served(int index);
  // With the error, or an empty text.
  void completed(int index, const std::string& error);
  // It could not be made.
  void refused(int index, const std::string& error, bool mayBe);
  // What a rank says of the loss of another: the first reason sticks.
  void lost(int at, int rank, const std::string& reason);
  const std::string& reasonOf(int at, int rank) const {
    return reasons_[static_cast<size_t>(at) * size_ + rank];
  }

  // Calls that are unanswered although nothing is wrong with their workers, none of which is `without`; any of one
  // rank.
  size_t pendingWithoutExcuse(const std::function<bool(int rank)>& without = [](int) { return false; }) const;
  size_t pendingOf(int rank) const;
  std::string aPendingCall() const;
  void checkAllCompleted() const;

 private:
  std::string wordsOf(const Call& call) const;
  bool mayFailWith(const Call& call, const std::string& error) const;
  static bool pending(const Call& call) {
    return call.completed == 0;
  }
  bool hasExcuse(const Call& call) const; // something that it needs has gone wrong
  bool needs(const Call& call, const std::function<bool(int rank)>& of) const;

  const int size_;
  std::vector<bool> excused_, dead_, stops_, shortOfMemory_;
  bool wordsFail_ = false;
  std::vector<std::string> reasons_;
  std::deque<Call> calls_;
};

} // namespace torch_rpc_mpi::simulation
