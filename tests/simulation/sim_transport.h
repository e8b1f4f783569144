// One rank's end of the network.
#pragma once

#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "network.h"

namespace torch_rpc_mpi::simulation {

class SimTransport final : public Transport {
 public:
  SimTransport(Network& network, int rank);

  int rank() const override {
    return rank_;
  }
  int size() const override {
    return network_.size();
  }
  BellWord& bell() override {
    return own().bell;
  }
  bool allRing() const override {
    return false;
  }
  void send(ProgressToken& token, int peer, Channel channel, const void* data, size_t bytes, Operation* op) override;
  std::optional<uint64_t> taken(ProgressToken& token, int peer, Channel channel) override;
  void awaitTaking(ProgressToken&, int, uint64_t) override {} // all poll for ever
  std::vector<int> frameSources() const override;
  void receiveFrame(ProgressToken& token, int source, void* data, size_t capacity, Operation* op) override;
  void receiveBulk(ProgressToken& token, int peer, void* data, size_t bytes, Operation* op) override;
  size_t poll(ProgressToken& token) override;
  std::vector<int> takeEnded(ProgressToken& token) override;
  void park(ProgressToken& token, int peer) override;
  size_t close(ProgressToken& token, bool agreed) noexcept override;

 private:
  struct Receive {
    int peer;
    char* data;
    size_t bytes;
    Operation* op;
    PacketPtr packet; // of a bulk receive that has begun
  };
  struct Send {
    PacketPtr packet;
    Operation* op;
    bool fails;
  };
  using Done = std::vector<std::pair<Operation*, OperationStatus>>;
  Network::OfRank& own() const {
    return network_.ranks_[rank_];
  }
  void checkUsable(int peer) const;
  void takeFrames(Done& done, size_t limit);
  void takeChunks(Done& done, size_t limit);
  void takeSends(Done& done, size_t limit);
  OperationStatus finish(const Receive& receive, Packet& packet, size_t from);
  void parkReceive(const Receive& receive);
  void parkSend(const Send& send);

  Network& network_;
  const int rank_;
  std::deque<Receive> frames_, bulk_;
  std::vector<Send> sends_;
  std::vector<bool> parkedPeers_;
  size_t parkedFrames_ = 0; // receives
  bool closed_ = false;
};

} // namespace torch_rpc_mpi::simulation
