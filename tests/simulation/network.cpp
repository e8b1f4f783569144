#include "network.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "peer/frame.h"
#include "trace.h"

namespace torch_rpc_mpi::simulation {

Network::Network(int size, Random& random, std::atomic<Clock::rep>& time)
    : size_(size),
      random_(random),
      time_(time),
      ranks_(size),
      underWay_(static_cast<size_t>(size) * size * 2),
      bulk_(underWay_.size()),
      sent_(underWay_.size(), 0),
      taken_(underWay_.size(), 0),
      counts_(random.chance(70)),
      armed_(static_cast<size_t>(size) * size, WireFault::kNone),
      cut_(armed_.size(), false) {
  const bool perSource = random.chance(50);
  for (OfRank& rank : ranks_) {
    rank.perSource = perSource;
  }
}

bool Network::anyUnderWay() const {
  return std::ranges::any_of(underWay_, [](const auto& queue) { return !queue.empty(); });
}

bool Network::deliver() {
  const size_t first = random_.below(underWay_.size());
  for (size_t i = 0; i < underWay_.size(); ++i) {
    const size_t index = (first + i) % underWay_.size();
    if (underWay_[index].empty()) {
      continue;
    }
    const PacketPtr packet = std::move(underWay_[index].front());
    underWay_[index].pop_front();
    const bool isFrame = packet->channel == Channel::kFrame;
    trace().note(isFrame ? "frame arrives" : "chunk arrives", packet->source, packet->destination);
    (isFrame ? ranks_[packet->destination].frames : bulk_[index]).push_back(packet);
    return true;
  }
  return false;
}

void Network::arm(int source, int destination, WireFault fault) {
  armed_[static_cast<size_t>(source) * size_ + destination] = fault;
}

void Network::disarmAll() {
  std::ranges::fill(armed_, WireFault::kNone);
}

WireFault Network::takeFault(const Packet& packet) {
  WireFault& armed = armed_[static_cast<size_t>(packet.source) * size_ + packet.destination];
  const bool isFrame = packet.channel == Channel::kFrame;
  const bool forFrames = armed == WireFault::kFlippedField || armed == WireFault::kShortFrame;
  if (armed == WireFault::kNone || (isFrame ? armed == WireFault::kShortChunk : forFrames)) {
    return WireFault::kNone;
  }
  trace().note("fault strikes", packet.source, packet.destination, static_cast<int64_t>(armed));
  onStruck(packet.source, packet.destination);
  return std::exchange(armed, WireFault::kNone);
}

// As the receiver will find it.
void Network::spoil(Packet& packet, WireFault fault) {
  if (fault == WireFault::kNone) {
    return;
  }
  if (fault == WireFault::kReceiveError) {
    packet.receiveFails = true;
    return;
  }
  if (packet.data != nullptr) {
    packet.copy.assign(packet.data, packet.bytes);
    packet.data = nullptr;
  }
  packet.taken = true;
  if (fault != WireFault::kFlippedField) {
    packet.bytes = random_.below(packet.bytes);
    return;
  }
  // Only what a receiver can find out: an error in the data itself, or in the name of a call that there is, would take
  // a checksum, and that is the network's.
  FrameHeader header;
  std::memcpy(&header, packet.copy.data(), sizeof(header));
  const size_t field = random_.below(8);
  trace().note("flips", static_cast<int64_t>(field));
  switch (field) {
    case 0:
      header.magic ^= uint32_t{1} << random_.below(32);
      break;
    case 1: {
      constexpr std::array<uint8_t, 4> kKinds{0, 3, 5, 77}; // any body is a goodbye's
      header.kind = static_cast<FrameKind>(kKinds[random_.below(kKinds.size())]);
      break;
    }
    case 2:
      header.bodyInBulk ^= 1;
      break;
    case 3:
      header.callId ^= uint64_t{1} << 62;
      break;
    case 4:
      header.bulkParts += header.bulkParts > 1 && random_.chance(50) ? -1 : 1; // without any, nothing would tell
      break;
    case 5:
      header.bodyBytes += random_.chance(50) ? 1 : random_.below(4096);
      break;
    case 6:
      header.chargedBytes ^= uint64_t{1} << random_.below(64);
      break;
    default:
      header.releasedRequests += uint64_t{1} << random_.between(9, 63);
      break;
  }
  std::memcpy(packet.copy.data(), &header, sizeof(header));
}

void Network::send(const PacketPtr& packet) {
  if (packet->channel == Channel::kFrame) {
    FrameHeader header;
    std::memcpy(&header, packet->data != nullptr ? packet->data : packet->copy.data(), sizeof(header));
    if (header.kind == FrameKind::kRequest && requests_.size() < 64) {
      requests_.push_back({header.callId, packet->source, packet->destination});
    }
  }
  ++sent_[channelIndex(packet->source, packet->destination, packet->channel)];
  checkCells(packet->source);
  spoil(*packet, takeFault(*packet));
  underWay_[channelIndex(packet->source, packet->destination, packet->channel)].push_back(packet);
}

// Those of stopped and dead ranks count, and each may have a goodbye beyond what is allowed.
void Network::checkCells(int rank) const {
  uint64_t used = 0;
  for (size_t i = channelIndex(rank, 0, Channel::kFrame); i <= channelIndex(rank, size_ - 1, Channel::kBulk); ++i) {
    used += sent_[i] - taken_[i];
  }
  if (counts_ && used > cells + size_) {
    trace().fail("rank " + std::to_string(rank) + " has sent " + std::to_string(used) + " messages that nobody takes");
  }
}

void Network::forge(int source, int destination, std::string frame) {
  auto packet = std::make_shared<Packet>();
  packet->source = source;
  packet->destination = destination;
  packet->bytes = frame.size();
  packet->copy = std::move(frame);
  packet->taken = true;
  packet->forged = true;
  underWay_[channelIndex(source, destination, Channel::kFrame)].push_back(packet);
}

std::optional<Network::Request> Network::someRequest(Random& random) const {
  return requests_.empty() ? std::nullopt : std::optional(requests_[random.below(requests_.size())]);
}

void Network::end(int rank) {
  for (int other = 0; other < size_; ++other) {
    for (const Channel channel : {Channel::kFrame, Channel::kBulk}) {
      auto& queue = underWay_[channelIndex(rank, other, channel)];
      queue.resize(random_.below(queue.size() + 1));
    }
  }
}

void Network::tellOfEnd(int ended, int rank) {
  ranks_[rank].ended.push_back(ended);
}

void Network::touchParked() {
  for (const Parked& parked : parked_) {
    if (parked.written != nullptr) {
      std::memset(parked.written, 0xEE, parked.bytes);
    } else {
      volatile char sink = 0;
      for (size_t i = 0; i < parked.bytes; i += 64) {
        sink = parked.read[i];
      }
      (void)sink;
    }
  }
}

bool Network::quietFor(int rank) const {
  const auto counts = [](const PacketPtr& packet) {
    FrameHeader header;
    if (packet->bytes < sizeof(header)) {
      return true;
    }
    std::memcpy(&header, packet->data != nullptr ? packet->data : packet->copy.data(), sizeof(header));
    ConstSpan frames{packet->data != nullptr ? packet->data : packet->copy.data(), packet->bytes};
    if (header.kind == FrameKind::kBatch) {
      frames = {frames.data + sizeof(header), frames.bytes - sizeof(header)};
    }
    while (packet->channel == Channel::kFrame && frames.bytes > 0) {
      std::memcpy(&header, frames.data, sizeof(header));
      if (header.kind != FrameKind::kDrain && header.kind != FrameKind::kGoodbye) {
        return true;
      }
      const size_t bytes = std::min(frames.bytes, sizeof(header) + header.bodyBytes);
      frames = {frames.data + bytes, frames.bytes - bytes};
    }
    return packet->channel == Channel::kBulk;
  };
  const auto concerns = [rank](const PacketPtr& packet) {
    return packet->source == rank || packet->destination == rank;
  };
  const auto quiet = [&](const std::deque<PacketPtr>& queue) {
    return std::ranges::all_of(queue, [&](const PacketPtr& packet) { return !concerns(packet) || !counts(packet); });
  };
  return std::ranges::all_of(underWay_, quiet) && std::ranges::all_of(bulk_, quiet) && quiet(ranks_[rank].frames);
}

} // namespace torch_rpc_mpi::simulation
