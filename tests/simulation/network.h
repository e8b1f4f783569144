// A network of ranks whose every move the scheduler decides, and that fails as it is told.
//
// It keeps MPI's promises and no others: order within a channel between two ranks, frame receives matched in the order
// in which they were posted, completion of everything else in any order, a send's memory read and a receive's written
// at any time until then, also when they are parked.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "random.h"
#include "transport/transport.h"

namespace torch_rpc_mpi::simulation {

enum class WireFault : uint8_t {
  kNone,
  kSendError,
  kReceiveError,
  kFlippedField, // of a frame's header
  kShortFrame,
  kShortChunk
};

struct Packet {
  int source = 0, destination = 0;
  Channel channel = Channel::kFrame;
  const char* data = nullptr; // the sender's memory, unless it was copied
  size_t bytes = 0;
  std::string copy;
  bool taken = false; // the sender's memory is not needed any more
  bool receiveFails = false;
  bool forged = false;
};
using PacketPtr = std::shared_ptr<Packet>;

class Network {
 public:
  Network(int size, Random& random, std::atomic<Clock::rep>& time);

  int size() const {
    return size_;
  }
  // A message arrives, on some channel; false if none is under way.
  bool deliver();
  bool anyUnderWay() const;
  // The next message of that kind from one rank to another suffers that.
  void arm(int source, int destination, WireFault fault);
  void disarmAll();
  // A frame that its sender never made.
  void forge(int source, int destination, std::string frame);
  // A request that has left a rank, if any: its call's id and where it went.
  struct Request {
    uint64_t id;
    int source, destination;
  };
  std::optional<Request> someRequest(Random& random) const;
  // The process of a rank ends: some of what it had sent is lost.
  void end(int rank);
  // It is told to another rank.
  void tellOfEnd(int ended, int rank);
  // Its next poll throws.
  void breakRank(int rank) {
    ranks_[rank].breaks = true;
  }
  // What was given up may still be read and written.
  void touchParked();
  bool quietFor(int rank) const; // but for drain frames, and the goodbye of one that came too late to agree
  // Called by the scheduler at each of its steps; a thread that polls too often between two of them hangs.
  void stepped() {
    pollsInStep_ = 0;
  }
  size_t cells = 0;         // of each rank, for messages that a neighbour has not received
  bool lateCallers = false; // somebody calls between two attempts to join: others may agree, and close, meanwhile
  // Called when a fault has struck between two ranks.
  std::function<void(int, int)> onStruck = [](int, int) {};

 private:
  friend class SimTransport;
  struct Parked {
    char* written;    // by a receive
    const char* read; // by a send
    size_t bytes;
  };
  struct OfRank {
    BellWord bell;
    std::vector<int> ended;
    std::deque<PacketPtr> frames;
    bool breaks = false;
    bool perSource = false;
  };
  size_t channelIndex(int source, int destination, Channel channel) const {
    return (static_cast<size_t>(source) * size_ + destination) * 2 + (channel == Channel::kBulk ? 1 : 0);
  }
  WireFault takeFault(const Packet& packet);
  void spoil(Packet& packet, WireFault fault);
  void send(const PacketPtr& packet);
  void checkCells(int rank) const;

  const int size_;
  Random& random_;
  std::atomic<Clock::rep>& time_;
  std::vector<OfRank> ranks_;
  std::vector<std::deque<PacketPtr>> underWay_; // by channelIndex()
  std::vector<std::deque<PacketPtr>> bulk_;     // arrived, by channelIndex()
  std::vector<uint64_t> sent_, taken_;          // likewise: how many, and of how many the receive is complete
  const bool counts_;                           // whether the ranks share memory, and so know that of one another
  std::vector<WireFault> armed_;                // by source * size + destination
  std::vector<bool> cut_;                       // likewise: a send has failed
  std::vector<Request> requests_;
  std::vector<Parked> parked_;
  size_t pollsInStep_ = 0;
};

} // namespace torch_rpc_mpi::simulation
