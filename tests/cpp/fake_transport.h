// A network of ranks inside one process, for testing everything above the transport seam without MPI.
//
// It keeps MPI's promises and no others: order within a channel between two ranks, frame receives matched in the order
// they were posted, a send complete only when its data was copied out (so that a sender that frees early is caught by
// the address sanitizer), truncation as an error.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "transport/transport.h"

namespace torch_rpc_mpi::testing {

class FakeNetwork {
 public:
  explicit FakeNetwork(int size) : size_(size), bells_(size) {}
  int size() const {
    return size_;
  }
  // Whether a send rings the receiver's bell.
  bool rings = false;
  // Whether ranks share memory, in which they count what they take.
  bool counts = true;
  // Sends up to so many bytes are copied at once, as eager MPI messages are; the others when they are received.
  size_t eagerBytes = 4096;
  // Asked after a poll of a rank in which something has finished: whether it fails all the same.
  std::function<bool(int rank)> fails = [](int) { return false; };
  // Asked of the next frame for a rank: whether it is still on its way, and all that come after it.
  std::function<bool(int to, const std::string& frame)> delays = [](int, const std::string&) { return false; };
  // The process of a rank ends.
  void end(int rank) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int other = 0; other < size_; ++other) {
      ended_[other].push_back(rank);
    }
  }

 private:
  friend class FakeTransport;
  struct Message {
    const char* data; // the sender's memory, unless it was copied
    std::string copy;
    size_t bytes;
    int source;
    std::shared_ptr<bool> taken;
  };
  const int size_;
  std::vector<BellWord> bells_;
  std::mutex mutex_;
  std::map<int, std::vector<int>> ended_;                   // by who has not taken it yet
  std::map<std::pair<int, int>, std::deque<Message>> bulk_; // (source, destination)
  std::map<int, std::deque<Message>> frames_;               // destination
  std::map<std::tuple<int, int, Channel>, uint64_t> taken_; // (source, destination, channel)
  std::map<std::pair<int, int>, uint64_t> awaited_;         // (source, destination)
};

class FakeTransport final : public Transport {
 public:
  FakeTransport(std::shared_ptr<FakeNetwork> network, int rank) : network_(std::move(network)), rank_(rank) {}

  int rank() const override {
    return rank_;
  }
  int size() const override {
    return network_->size();
  }
  BellWord& bell() override {
    return network_->bells_[rank_];
  }
  bool allRing() const override {
    return network_->rings;
  }
  std::vector<int> takeEnded(ProgressToken&) override {
    const std::lock_guard<std::mutex> lock(network_->mutex_);
    return std::exchange(network_->ended_[rank_], {});
  }

  void send(ProgressToken& token, int peer, Channel channel, const void* data, size_t bytes, Operation* op) override {
    if (sendsFail) {
      OperationStatus status;
      status.error = "the send failed";
      op->complete(token, status);
      return;
    }
    auto taken = std::make_shared<bool>(false);
    FakeNetwork::Message message{static_cast<const char*>(data), "", bytes, rank_, taken};
    const bool eager = bytes <= network_->eagerBytes;
    if (eager) {
      message.copy.assign(message.data, bytes);
      message.data = nullptr;
    }
    {
      const std::lock_guard<std::mutex> lock(network_->mutex_);
      auto& queue = channel == Channel::kFrame ? network_->frames_[peer] : network_->bulk_[{rank_, peer}];
      queue.push_back(std::move(message));
    }
    ++sends;
    if (network_->rings) {
      Doorbell::ring(network_->bells_[peer]);
    }
    if (eager) {
      op->complete(token, {});
    } else {
      sends_.push_back({peer, taken, op});
    }
  }
  std::optional<uint64_t> taken(ProgressToken&, int peer, Channel channel) override {
    const std::lock_guard<std::mutex> lock(network_->mutex_);
    return network_->counts ? std::optional(network_->taken_[{rank_, peer, channel}]) : std::nullopt;
  }
  void awaitTaking(ProgressToken&, int peer, uint64_t messages) override {
    const std::lock_guard<std::mutex> lock(network_->mutex_);
    network_->awaited_[{rank_, peer}] = messages;
  }
  std::vector<int> frameSources() const override {
    return sources;
  }
  void receiveFrame(ProgressToken&, int source, void* data, size_t capacity, Operation* op) override {
    frames_.push_back({source, static_cast<char*>(data), capacity, op});
  }
  void receiveBulk(ProgressToken&, int peer, void* data, size_t bytes, Operation* op) override {
    bulk_.push_back({peer, static_cast<char*>(data), bytes, op});
  }

  size_t poll(ProgressToken& token) override {
    std::vector<std::pair<Operation*, OperationStatus>> done;
    {
      const std::lock_guard<std::mutex> lock(network_->mutex_);
      auto& arrived = network_->frames_[rank_];
      const auto fits = [&](const Receive& receive) {
        return receive.peer == kAnySource || receive.peer == arrived.front().source;
      };
      while (!arrived.empty() && !network_->delays(rank_, arrived.front().copy)) {
        const auto receive = std::find_if(frames_.begin(), frames_.end(), fits);
        if (receive == frames_.end()) {
          break;
        }
        done.emplace_back(receive->op, deliver(*receive, arrived));
        took(done.back().second.source, Channel::kFrame);
        frames_.erase(receive);
      }
      for (auto receive = bulk_.begin(); receive != bulk_.end();) {
        auto& queue = network_->bulk_[{receive->peer, rank_}];
        if (queue.empty()) {
          ++receive;
          continue;
        }
        done.emplace_back(receive->op, deliver(*receive, queue));
        took(receive->peer, Channel::kBulk);
        receive = bulk_.erase(receive);
      }
      for (auto sent = sends_.begin(); sent != sends_.end();) {
        if (*sent->taken) {
          done.emplace_back(sent->op, OperationStatus{});
          sent = sends_.erase(sent);
        } else {
          ++sent;
        }
      }
    }
    for (auto& [op, status] : done) {
      op->complete(token, status);
    }
    if (!done.empty() && network_->fails(rank_)) {
      throw std::runtime_error("the wire is cut");
    }
    return done.size();
  }
  void park(ProgressToken&, int peer) override {
    const auto parkAll = [&](auto& posted, const auto& peerOf, const auto& operationOf) {
      std::erase_if(posted, [&](const auto& each) {
        if (peerOf(each) == peer) {
          parkingLot().push_back(operationOf(each));
        }
        return peerOf(each) == peer;
      });
    };
    const auto peerOf = [](const auto& each) { return each.peer; };
    const auto operationOf = [](const auto& each) { return each.op; };
    parkAll(frames_, peerOf, operationOf);
    parkAll(bulk_, peerOf, operationOf);
    parkAll(sends_, peerOf, operationOf);
    ++parked;
  }
  size_t close(ProgressToken&, bool agreed) noexcept override {
    closed = true;
    closedByAgreement = agreed;
    frames_.clear();
    for (const Receive& receive : std::exchange(bulk_, {})) {
      parkingLot().push_back(receive.op);
    }
    for (const Send& send : std::exchange(sends_, {})) {
      parkingLot().push_back(send.op);
    }
    return 0;
  }

  // The receive of a frame that is next fails.
  void fail(ProgressToken& token, const OperationStatus& status) {
    Operation* op = frames_.front().op;
    frames_.pop_front();
    op->complete(token, status);
  }

  int sends = 0;
  bool sendsFail = false;
  std::vector<int> sources{kAnySource}; // before the exchange starts
  int parked = 0;                       // peers
  bool closed = false;
  bool closedByAgreement = false;

 private:
  struct Receive {
    int peer;
    char* data;
    size_t bytes;
    Operation* op;
  };
  void took(int source, Channel channel) { // with the mutex
    ++network_->taken_[{source, rank_, channel}];
    const uint64_t taken =
        network_->taken_[{source, rank_, Channel::kFrame}] + network_->taken_[{source, rank_, Channel::kBulk}];
    const auto awaited = network_->awaited_.find({source, rank_});
    if (awaited != network_->awaited_.end() && taken >= awaited->second) {
      network_->awaited_.erase(awaited);
      Doorbell::ring(network_->bells_[source]);
    }
  }
  static OperationStatus deliver(const Receive& receive, std::deque<FakeNetwork::Message>& queue) {
    FakeNetwork::Message message = std::move(queue.front());
    queue.pop_front();
    const char* data = message.data != nullptr ? message.data : message.copy.data();
    OperationStatus status;
    status.source = message.source;
    status.bytes = std::min(message.bytes, receive.bytes);
    if (status.bytes > 0) {
      std::copy(data, data + status.bytes, receive.data);
    }
    if (message.bytes > receive.bytes) {
      status.error = "message truncated";
    }
    *message.taken = true;
    return status;
  }

  const std::shared_ptr<FakeNetwork> network_;
  const int rank_;
  std::deque<Receive> frames_;
  std::vector<Receive> bulk_;
  struct Send {
    int peer;
    std::shared_ptr<bool> taken;
    Operation* op;
  };
  // What MPI might still touch lives for ever, and is no leak.
  static std::vector<Operation*>& parkingLot() {
    static auto* operations = new std::vector<Operation*>();
    return *operations;
  }
  std::vector<Send> sends_;
};

} // namespace torch_rpc_mpi::testing
