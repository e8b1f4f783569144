#include "sim_transport.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "allocations.h"
#include "trace.h"
#include "user_thread.h"

namespace torch_rpc_mpi::simulation {

namespace {

constexpr size_t kEagerBytes = 300; // longer messages are read from the sender's memory when they arrive, or later
constexpr size_t kPollsOfAHang = 1000000;

} // namespace

SimTransport::SimTransport(Network& network, int rank)
    : network_(network),
      rank_(rank),
      parkedPeers_(network.size(), false) {}

void SimTransport::checkUsable(int peer) const {
  if (closed_ || (peer != kAnySource && parkedPeers_[peer])) {
    trace().fail(
        "rank " + std::to_string(rank_) + " posts something for rank " + std::to_string(peer) +
        " although that was parked, or the transport closed");
  }
}

void SimTransport::send(
    ProgressToken& token,
    int peer,
    Channel channel,
    const void* data,
    size_t bytes,
    Operation* op) {
  bool completes = false;
  OperationStatus status;
  {
    const testing::OwnAllocations own;
    checkUsable(peer);
    auto packet = std::make_shared<Packet>();
    packet->source = rank_;
    packet->destination = peer;
    packet->channel = channel;
    packet->data = static_cast<const char*>(data);
    packet->bytes = bytes;
    if (bytes <= kEagerBytes && network_.random_.chance(80)) {
      packet->copy.assign(packet->data, bytes);
      packet->data = nullptr;
      packet->taken = true;
    }
    const size_t pair = static_cast<size_t>(rank_) * size() + peer;
    const bool strikes =
        network_.armed_[pair] == WireFault::kSendError && network_.takeFault(*packet) == WireFault::kSendError;
    const bool fails = strikes || network_.cut_[pair];
    if (!fails) {
      network_.send(packet);
    }
    completes = (fails || packet->taken) && network_.random_.chance(50);
    if (!completes) {
      network_.cut_[pair] = network_.cut_[pair] || fails; // nothing gets past what is lost
      sends_.push_back({packet, op, fails});
    }
    status.error = fails ? "the send failed" : "";
  }
  if (completes) {
    op->complete(token, status);
  }
}

std::optional<uint64_t> SimTransport::taken(ProgressToken&, int peer, Channel channel) {
  return network_.counts_ ? std::optional(network_.taken_[network_.channelIndex(rank_, peer, channel)]) : std::nullopt;
}

std::vector<int> SimTransport::frameSources() const {
  std::vector<int> sources;
  for (int rank = 0; own().perSource && rank < size(); ++rank) {
    if (rank != rank_) {
      sources.push_back(rank);
    }
  }
  return own().perSource ? sources : std::vector<int>{kAnySource};
}

void SimTransport::receiveFrame(ProgressToken&, int source, void* data, size_t capacity, Operation* op) {
  const testing::OwnAllocations own;
  checkUsable(source);
  frames_.push_back({source, static_cast<char*>(data), capacity, op, nullptr});
}

void SimTransport::receiveBulk(ProgressToken&, int peer, void* data, size_t bytes, Operation* op) {
  const testing::OwnAllocations own;
  checkUsable(peer);
  bulk_.push_back({peer, static_cast<char*>(data), bytes, op, nullptr});
}

OperationStatus SimTransport::finish(const Receive& receive, Packet& packet, size_t from) {
  OperationStatus status;
  status.source = packet.source;
  status.bytes = std::min(packet.bytes, receive.bytes);
  const char* data = packet.data != nullptr ? packet.data : packet.copy.data();
  if (status.bytes > from) {
    std::memcpy(receive.data + from, data + from, status.bytes - from);
  }
  if (packet.bytes > receive.bytes) {
    status.error = "message truncated";
  } else if (packet.receiveFails) {
    status.error = "the receive failed";
  }
  packet.taken = true;
  if (!packet.forged) {
    ++network_.taken_[network_.channelIndex(packet.source, packet.destination, packet.channel)];
  }
  return status;
}

void SimTransport::takeFrames(Done& done, size_t limit) {
  auto& arrived = own().frames;
  for (auto packet = arrived.begin(); packet != arrived.end() && done.size() < limit;) {
    const auto receive = std::ranges::find_if(
        frames_, [&](const Receive& each) { return each.peer == kAnySource || each.peer == (*packet)->source; });
    if (receive == frames_.end()) {
      ++packet;
      continue;
    }
    done.emplace_back(receive->op, finish(*receive, **packet, 0));
    frames_.erase(receive);
    packet = arrived.erase(packet);
  }
}

// Each is received in two steps, of which the second may come much later, or never.
void SimTransport::takeChunks(Done& done, size_t limit) {
  for (auto receive = bulk_.begin(); receive != bulk_.end();) {
    auto& arrived = network_.bulk_[network_.channelIndex(receive->peer, rank_, Channel::kBulk)];
    if (receive->packet == nullptr && !arrived.empty()) {
      receive->packet = std::move(arrived.front());
      arrived.pop_front();
      const Packet& packet = *receive->packet;
      const char* data = packet.data != nullptr ? packet.data : packet.copy.data();
      if (const size_t half = std::min(packet.bytes, receive->bytes) / 2; half > 0) {
        std::memcpy(receive->data, data, half);
      }
    }
    if (receive->packet != nullptr && done.size() < limit && network_.random_.chance(60)) {
      done.emplace_back(
          receive->op, finish(*receive, *receive->packet, std::min(receive->packet->bytes, receive->bytes) / 2));
      receive = bulk_.erase(receive);
    } else {
      ++receive;
    }
  }
}

void SimTransport::takeSends(Done& done, size_t limit) {
  for (auto send = sends_.begin(); send != sends_.end();) {
    if ((send->packet->taken || send->fails) && done.size() < limit && network_.random_.chance(60)) {
      done.emplace_back(send->op, OperationStatus{kAnySource, 0, send->fails ? "the send failed" : ""});
      send = sends_.erase(send);
    } else {
      ++send;
    }
  }
}

size_t SimTransport::poll(ProgressToken& token) {
  // A thread that polls on its own takes time, or would wait for a deadline for ever.
  network_.time_ += std::chrono::nanoseconds(UserThread::here() ? 500000 : 1000).count();
  if (++network_.pollsInStep_ > kPollsOfAHang) {
    trace().fail("rank " + std::to_string(rank_) + " polls for ever");
  }
  if (closed_) {
    return 0;
  }
  Done done;
  {
    const testing::OwnAllocations own;
    const size_t limit = network_.random_.between(1, 8);
    takeFrames(done, limit);
    takeChunks(done, limit);
    takeSends(done, limit);
  }
  for (const auto& [op, status] : done) {
    op->complete(token, status); // also if one before it has ended that peer
  }
  if (std::exchange(own().breaks, false)) {
    throw std::runtime_error("the wire is cut");
  }
  const testing::OwnAllocations freed;
  const size_t count = done.size();
  done = {};
  return count;
}

std::vector<int> SimTransport::takeEnded(ProgressToken&) {
  return std::exchange(own().ended, {});
}

void SimTransport::parkReceive(const Receive& receive) {
  network_.parked_.push_back({receive.data, nullptr, receive.bytes});
}

void SimTransport::parkSend(const Send& send) {
  if (send.packet->data != nullptr && !send.packet->taken) {
    network_.parked_.push_back({nullptr, send.packet->data, send.packet->bytes});
  }
}

void SimTransport::park(ProgressToken&, int peer) {
  const testing::OwnAllocations own;
  trace().note("parks", rank_, peer);
  parkedPeers_[peer] = true;
  parkedFrames_ += static_cast<size_t>(
      std::ranges::count_if(frames_, [peer](const Receive& receive) { return receive.peer == peer; }));
  for (auto* receives : {&frames_, &bulk_}) {
    std::erase_if(*receives, [&](const Receive& receive) {
      if (receive.peer == peer) {
        parkReceive(receive);
      }
      return receive.peer == peer;
    });
  }
  std::erase_if(sends_, [&](const Send& send) {
    if (send.packet->destination == peer) {
      parkSend(send);
    }
    return send.packet->destination == peer;
  });
}

size_t SimTransport::close(ProgressToken&, bool agreed) noexcept {
  const testing::OwnAllocations own;
  trace().note("closes", rank_, agreed ? 1 : 0);
  if (agreed && !network_.lateCallers && (!network_.quietFor(rank_) || !bulk_.empty())) {
    trace().fail("rank " + std::to_string(rank_) + " closes in agreement while messages are under way");
  }
  closed_ = true;
  const size_t kept = agreed || network_.random_.chance(50) ? 0 : network_.random_.below(frames_.size() + 1);
  for (size_t i = 0; i < kept; ++i) {
    parkReceive(frames_[i]);
  }
  for (const Receive& receive : bulk_) {
    parkReceive(receive);
  }
  for (const Send& send : sends_) {
    parkSend(send);
  }
  frames_.clear();
  bulk_.clear();
  sends_.clear();
  return kept + parkedFrames_;
}

} // namespace torch_rpc_mpi::simulation
