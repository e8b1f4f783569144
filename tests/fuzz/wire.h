// One rank's end of a network whose other ranks send what the fuzzer says.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "transport/transport.h"

namespace torch_rpc_mpi::fuzz {

// What was sent and has not been received, and what time it is. Outlives the transport.
struct Wire {
  std::deque<std::pair<int, std::string>> frames; // with their sources
  std::map<int, std::deque<std::string>> chunks;  // by source
  std::map<int, std::deque<size_t>> expected;     // sizes of the receives of chunks that are posted, by source
  std::atomic<Clock::rep> time{Clock::duration(std::chrono::seconds(1)).count()};
  char read = 0; // of what the rank has sent: all of it
};

class WireTransport final : public Transport {
 public:
  WireTransport(Wire& wire, int rank, int size, bool perSource)
      : wire_(wire),
        rank_(rank),
        size_(size),
        perSource_(perSource) {}

  int rank() const override {
    return rank_;
  }
  int size() const override {
    return size_;
  }
  BellWord& bell() override {
    return bell_;
  }
  bool allRing() const override {
    return false;
  }
  std::vector<int> takeEnded(ProgressToken&) override {
    return {};
  }
  void send(ProgressToken& token, int, Channel, const void* data, size_t bytes, Operation* op) override {
    const char* each = static_cast<const char*>(data);
    wire_.read = std::accumulate(each, each + bytes, wire_.read, [](char a, char b) { return a ^ b; });
    op->complete(token, {});
  }
  std::optional<uint64_t> taken(ProgressToken&, int, Channel) override {
    return std::nullopt; // peers of other hosts
  }
  void awaitTaking(ProgressToken&, int, uint64_t) override {}
  std::vector<int> frameSources() const override {
    std::vector<int> sources;
    for (int rank = 0; perSource_ && rank < size_; ++rank) {
      if (rank != rank_) {
        sources.push_back(rank);
      }
    }
    return perSource_ ? sources : std::vector<int>{kAnySource};
  }
  void receiveFrame(ProgressToken&, int source, void* data, size_t capacity, Operation* op) override {
    frames_.push_back({source, static_cast<char*>(data), capacity, op});
  }
  void receiveBulk(ProgressToken&, int peer, void* data, size_t bytes, Operation* op) override {
    chunks_.push_back({peer, static_cast<char*>(data), bytes, op});
    wire_.expected[peer].push_back(bytes);
  }
  size_t poll(ProgressToken& token) override {
    wire_.time += std::chrono::nanoseconds(std::chrono::microseconds(10)).count();
    return receiveFrames(token) + receiveChunks(token);
  }
  void park(ProgressToken&, int peer) override {
    for (auto* receives : {&frames_, &chunks_}) {
      for (const Receive& receive : *receives) {
        if (receive.source == peer) {
          parkingLot().push_back(receive.op);
        }
      }
      std::erase_if(*receives, [peer](const Receive& receive) { return receive.source == peer; });
    }
    wire_.expected.erase(peer);
  }
  size_t close(ProgressToken&, bool) noexcept override {
    for (const Receive& receive : chunks_) {
      parkingLot().push_back(receive.op);
    }
    frames_.clear();
    chunks_.clear();
    return 0;
  }

 private:
  struct Receive {
    int source;
    char* data;
    size_t bytes;
    Operation* op;
  };

  static OperationStatus take(const Receive& receive, int source, const std::string& sent) {
    OperationStatus status;
    status.source = source;
    status.bytes = std::min(receive.bytes, sent.size());
    std::copy_n(sent.data(), status.bytes, receive.data);
    status.error = sent.size() > receive.bytes ? "message truncated" : "";
    return status;
  }

  size_t receiveFrames(ProgressToken& token) {
    size_t received = 0;
    while (!wire_.frames.empty()) {
      const auto [source, sent] = wire_.frames.front();
      wire_.frames.pop_front();
      const auto receive = std::find_if(frames_.begin(), frames_.end(), [source = source](const Receive& each) {
        return each.source == kAnySource || each.source == source;
      });
      if (receive != frames_.end()) { // else the source is parked
        const Receive found = *receive;
        frames_.erase(receive);
        found.op->complete(token, take(found, source, sent));
        ++received;
      }
    }
    return received;
  }

  size_t receiveChunks(ProgressToken& token) {
    size_t received = 0;
    for (auto& [source, sent] : wire_.chunks) {
      while (!sent.empty()) {
        const auto receive = std::find_if(
            chunks_.begin(), chunks_.end(), [source = source](const Receive& each) { return each.source == source; });
        if (receive == chunks_.end()) {
          break;
        }
        const Receive found = *receive;
        const std::string chunk = std::move(sent.front());
        sent.pop_front();
        chunks_.erase(receive);
        wire_.expected[source].pop_front();
        found.op->complete(token, take(found, source, chunk));
        ++received;
      }
    }
    return received;
  }

  // What MPI might still touch lives for ever, and is no leak.
  static std::vector<Operation*>& parkingLot() {
    static auto* operations = new std::vector<Operation*>();
    return *operations;
  }

  Wire& wire_;
  const int rank_, size_;
  const bool perSource_;
  BellWord bell_{};
  std::deque<Receive> frames_, chunks_;
};

} // namespace torch_rpc_mpi::fuzz
