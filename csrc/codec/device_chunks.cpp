#include "codec/device_chunks.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <utility>

#include "codec/tensor_codec.h"

namespace torch_rpc_mpi {

namespace {

constexpr size_t kAhead = 4;         // chunks of one slice that are brought to the host before they are sent
constexpr size_t kChunksPinned = 16; // of all slices, in each direction; each slice may always have one

// A chunk in pinned memory, counted.
class PinnedChunk {
 public:
  PinnedChunk(std::shared_ptr<Devices> devices, c10::Device device, std::atomic<size_t>& count, size_t bytes)
      : devices_(std::move(devices)),
        count_(count),
        block_(devices_->pinned(device, devices_->chunk())),
        bytes_(bytes) {
    count_.fetch_add(1);
  }
  ~PinnedChunk() {
    count_.fetch_sub(1);
  }
  PinnedChunk(const PinnedChunk&) = delete;
  PinnedChunk& operator=(const PinnedChunk&) = delete;

  char* data() const {
    return block_.data();
  }
  size_t bytes() const {
    return bytes_;
  }

 private:
  const std::shared_ptr<Devices> devices_;
  std::atomic<size_t>& count_;
  const PinnedBlock block_;
  const size_t bytes_;
};

size_t chunksOf(size_t bytes, size_t chunk) {
  return (bytes + chunk - 1) / chunk;
}

class PinnedSource final : public ChunkSource {
 public:
  PinnedSource(std::shared_ptr<Devices> devices, const c10::Stream& stream, ConstSpan memory)
      : devices_(std::move(devices)),
        stream_(stream),
        memory_(memory) {}
  size_t chunks() const override {
    return chunksOf(memory_.bytes, devices_->chunk());
  }
  std::optional<ConstSpan> next() override {
    while (begun_ < memory_.bytes && coming_.size() < kAhead &&
           (devices_->chunksOut < kChunksPinned || coming_.size() + leaving_.size() == 0)) {
      begin();
    }
    if (coming_.empty() || !coming_.front().event.complete()) {
      return std::nullopt;
    }
    leaving_.push_back(std::move(coming_.front().chunk));
    coming_.pop_front();
    return ConstSpan{leaving_.back()->data(), leaving_.back()->bytes()};
  }
  void sent() override {
    leaving_.pop_front();
  }
  // What the device still writes to stays until it has.
  ~PinnedSource() override {
    for (Coming& coming : coming_) {
      devices_->holdUntil(std::move(coming.event), std::move(coming.chunk));
    }
  }

 private:
  struct Coming {
    std::shared_ptr<PinnedChunk> chunk;
    DeviceEvent event;
  };
  void begin() {
    const size_t bytes = std::min(devices_->chunk(), memory_.bytes - begun_);
    const c10::Device device = stream_.device();
    Coming coming{std::make_shared<PinnedChunk>(devices_, device, devices_->chunksOut, bytes), devices_->event(device)};
    const OnDevice onDevice(devices_->runtime(), device.index());
    void* const stream = devices_->runtime().handleOf(stream_);
    devices_->runtime().copy(coming.chunk->data(), memory_.data + begun_, bytes, stream);
    coming.event.record(stream);
    coming_.push_back(std::move(coming));
    begun_ += bytes;
    devices_->counters.sentPinned.fetch_add(bytes, std::memory_order_relaxed);
  }

  const std::shared_ptr<Devices> devices_;
  const c10::Stream stream_;
  const ConstSpan memory_;
  size_t begun_ = 0; // bytes that are being copied or have been
  std::deque<Coming> coming_;
  std::deque<std::shared_ptr<PinnedChunk>> leaving_;
};

class PinnedSink final : public ChunkSink {
 public:
  PinnedSink(std::shared_ptr<Devices> devices, const c10::Stream& stream, MutableSpan memory)
      : devices_(std::move(devices)),
        stream_(stream),
        memory_(memory) {}
  size_t chunks() const override {
    return chunksOf(memory_.bytes, devices_->chunk());
  }
  std::optional<MutableSpan> next() override {
    const size_t bytes = std::min(devices_->chunk(), memory_.bytes - begun_);
    if (memory_.data == nullptr) {
      begun_ += bytes;
      return MutableSpan{nullptr, bytes};
    }
    if (devices_->chunksIn >= kChunksPinned && (!coming_.empty() || !last_.expired())) {
      return std::nullopt;
    }
    coming_.push_back(std::make_shared<PinnedChunk>(devices_, stream_.device(), devices_->chunksIn, bytes));
    last_ = coming_.back();
    begun_ += bytes;
    return MutableSpan{coming_.back()->data(), bytes};
  }
  void received() override {
    const std::shared_ptr<PinnedChunk> chunk = std::move(coming_.front());
    coming_.pop_front();
    const OnDevice onDevice(devices_->runtime(), stream_.device_index());
    void* const stream = devices_->runtime().handleOf(stream_);
    DeviceEvent event = devices_->event(stream_.device());
    devices_->runtime().copy(memory_.data + copied_, chunk->data(), chunk->bytes(), stream);
    copied_ += chunk->bytes();
    event.record(stream);
    devices_->holdUntil(std::move(event), chunk);
    devices_->counters.receivedPinned.fetch_add(chunk->bytes(), std::memory_order_relaxed);
  }

 private:
  const std::shared_ptr<Devices> devices_;
  const c10::Stream stream_;
  const MutableSpan memory_; // without data: there is none for it
  size_t begun_ = 0, copied_ = 0;
  std::deque<std::shared_ptr<PinnedChunk>> coming_; // that the transport writes to
  std::weak_ptr<PinnedChunk> last_;                 // given out: while it is in use, this one has its share
};

// The chunks are tickets of pieces that are lent.
class TicketSource final : public ChunkSource {
 public:
  TicketSource(
      std::shared_ptr<Devices> devices,
      int borrower,
      const c10::Stream& stream,
      ConstSpan memory,
      size_t piece)
      : devices_(std::move(devices)),
        borrower_(borrower),
        stream_(stream),
        memory_(memory),
        piece_(piece) {}
  size_t chunks() const override {
    return chunksOf(memory_.bytes, piece_);
  }
  std::optional<ConstSpan> next() override {
    while (lent_ < memory_.bytes && begin()) {
    }
    if (coming_.empty() || !coming_.front().event.complete()) {
      return std::nullopt;
    }
    leaving_.push_back(coming_.front().ticket);
    coming_.pop_front();
    return ConstSpan{reinterpret_cast<const char*>(&leaving_.back()), sizeof(Ticket)};
  }
  void sent() override {
    leaving_.pop_front();
  }
  // Whether it has a piece. One that has not would wait, and all that is on the bulk channel behind it.
  bool begun() const {
    return lent_ > 0;
  }
  bool begin() { // false: there is no piece free
    const size_t bytes = std::min(piece_, memory_.bytes - lent_);
    const c10::DeviceIndex device = stream_.device_index();
    const auto lease = devices_->lender()->lend(borrower_, device, bytes);
    if (!lease) {
      if (begun() && devices_->lender()->pieceFor(device, bytes) < bytes) { // the region has gone with a peer
        throw DeviceError("there is no device memory for the rest of a tensor");
      }
      return false;
    }
    const OnDevice onDevice(devices_->runtime(), device);
    void* const stream = devices_->runtime().handleOf(stream_);
    devices_->runtime().copy(lease->memory, memory_.data + lent_, bytes, stream);
    coming_.push_back({lease->ticket, devices_->event(stream_.device())});
    coming_.back().event.record(stream);
    lent_ += bytes;
    devices_->counters.sentIpc.fetch_add(bytes, std::memory_order_relaxed);
    return true;
  }
  // Pieces whose tickets have not left go back when the device is done with them.
  ~TicketSource() override {
    for (Coming& coming : coming_) {
      devices_->holdUntil(
          std::move(coming.event), std::make_shared<AtLast>([lender = devices_->lender(), ticket = coming.ticket] {
            lender->withdraw(ticket);
          }));
    }
  }

 private:
  struct Coming {
    Ticket ticket;
    DeviceEvent event;
  };
  const std::shared_ptr<Devices> devices_;
  const int borrower_;
  const c10::Stream stream_;
  const ConstSpan memory_;
  const size_t piece_; // bytes
  size_t lent_ = 0;
  std::deque<Coming> coming_;
  std::deque<Ticket> leaving_; // their places do not change
};

class TicketSink final : public ChunkSink {
 public:
  TicketSink(std::shared_ptr<Devices> devices, int source, const c10::Stream& stream, MutableSpan memory, size_t piece)
      : devices_(std::move(devices)),
        source_(source),
        stream_(stream),
        memory_(memory),
        piece_(piece) {}
  size_t chunks() const override {
    return chunksOf(memory_.bytes, piece_);
  }
  std::optional<MutableSpan> next() override {
    coming_.emplace_back();
    return MutableSpan{reinterpret_cast<char*>(&coming_.back()), sizeof(Ticket)};
  }
  void received() override {
    const auto loan = std::make_shared<Borrower::Loan>(devices_->borrower(), source_, coming_.front());
    coming_.pop_front();
    const size_t bytes = std::min(piece_, memory_.bytes - copied_);
    require(loan->ticket().bytes == bytes, "a piece that it lends has another size than it says");
    if (memory_.data == nullptr) {
      copied_ += bytes;
      return;
    }
    const OnDevice onDevice(devices_->runtime(), stream_.device_index());
    void* const stream = devices_->runtime().handleOf(stream_);
    const char* const from = devices_->borrower()->open(*loan, stream_.device_index());
    devices_->runtime().copy(memory_.data + copied_, from, bytes, stream);
    copied_ += bytes;
    DeviceEvent event = devices_->event(stream_.device());
    event.record(stream);
    devices_->holdUntil(std::move(event), loan);
    devices_->counters.receivedIpc.fetch_add(bytes, std::memory_order_relaxed);
  }

 private:
  const std::shared_ptr<Devices> devices_;
  const int source_;
  const c10::Stream stream_;
  const MutableSpan memory_; // without data: there is none for it
  const size_t piece_;
  size_t copied_ = 0;
  std::deque<Ticket> coming_; // that the transport writes to
};

} // namespace

std::unique_ptr<ChunkSource> pinnedSource(
    std::shared_ptr<Devices> devices,
    const c10::Stream& stream,
    ConstSpan memory) {
  return std::make_unique<PinnedSource>(std::move(devices), stream, memory);
}

std::unique_ptr<ChunkSink> pinnedSink(std::shared_ptr<Devices> devices, const c10::Stream& stream, MutableSpan memory) {
  return std::make_unique<PinnedSink>(std::move(devices), stream, memory);
}

std::unique_ptr<ChunkSource> ticketSource(
    std::shared_ptr<Devices> devices,
    int borrower,
    const c10::Stream& stream,
    ConstSpan memory,
    size_t piece) {
  auto source = std::make_unique<TicketSource>(std::move(devices), borrower, stream, memory, piece);
  return source->begin() ? std::move(source) : nullptr;
}

std::unique_ptr<ChunkSink> ticketSink(
    std::shared_ptr<Devices> devices,
    int lender,
    const c10::Stream& stream,
    MutableSpan memory,
    size_t piece) {
  return std::make_unique<TicketSink>(std::move(devices), lender, stream, memory, piece);
}

} // namespace torch_rpc_mpi
