#include "codec/direct_chunks.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace torch_rpc_mpi {

namespace {

// The chunks of some memory, in their order.
class Chunks {
 public:
  Chunks(std::shared_ptr<Devices> devices, size_t bytes) : devices_(std::move(devices)), bytes_(bytes) {}

  // They are ready once what lies in the stream now is done.
  void follow(const c10::Stream& stream) {
    before_ = devices_->event(stream.device());
    const OnDevice onDevice(devices_->runtime(), stream.device_index());
    before_->record(devices_->runtime().handleOf(stream));
  }

  size_t count() const {
    return (bytes_ + devices_->chunk() - 1) / devices_->chunk();
  }
  bool ready() {
    if (before_ && before_->complete()) {
      before_.reset();
    }
    return !before_;
  }
  struct Chunk {
    size_t offset;
    size_t bytes;
  };
  Chunk take() {
    const Chunk chunk{taken_, std::min(devices_->chunk(), bytes_ - taken_)};
    taken_ += chunk.bytes;
    return chunk;
  }
  size_t done() { // of the first in use: its bytes
    const size_t bytes = std::min(devices_->chunk(), bytes_ - done_);
    done_ += bytes;
    return bytes;
  }
  bool inUse() const { // by the transport
    return done_ < taken_;
  }
  Devices& devices() const {
    return *devices_;
  }

 private:
  const std::shared_ptr<Devices> devices_;
  const size_t bytes_;
  std::optional<DeviceEvent> before_;
  size_t taken_ = 0, done_ = 0; // bytes
};

class DirectSource final : public ChunkSource {
 public:
  DirectSource(std::shared_ptr<Devices> devices, const c10::Stream& stream, ConstSpan memory, c10::Storage owner)
      : memory_(memory),
        owner_(std::move(owner)),
        chunks_(std::move(devices), memory.bytes) {
    chunks_.follow(stream);
  }
  size_t chunks() const override {
    return chunks_.count();
  }
  std::optional<ConstSpan> next() override {
    if (!chunks_.ready()) {
      return std::nullopt;
    }
    const auto [offset, bytes] = chunks_.take();
    return ConstSpan{memory_.data + offset, bytes};
  }
  void sent() override {
    chunks_.devices().counters.sentMpi.fetch_add(chunks_.done(), std::memory_order_relaxed);
  }
  void abandon() noexcept override {
    if (!chunks_.inUse()) {
      owner_ = {};
    }
  }

 private:
  const ConstSpan memory_;
  c10::Storage owner_;
  Chunks chunks_;
};

class DirectSink final : public ChunkSink {
 public:
  DirectSink(std::shared_ptr<Devices> devices, const c10::Stream& stream, MutableSpan memory)
      : memory_(memory),
        stream_(stream),
        chunks_(std::move(devices), memory.bytes) {}
  size_t chunks() const override {
    return chunks_.count();
  }
  std::optional<MutableSpan> next() override {
    if (!std::exchange(begun_, true) && memory_.data != nullptr) {
      chunks_.follow(stream_);
    }
    if (!chunks_.ready()) {
      return std::nullopt;
    }
    const auto [offset, bytes] = chunks_.take();
    return MutableSpan{memory_.data == nullptr ? nullptr : memory_.data + offset, bytes};
  }
  void received() override {
    chunks_.devices().counters.receivedMpi.fetch_add(chunks_.done(), std::memory_order_relaxed);
  }
  bool keepsMemory() const override {
    return memory_.data != nullptr && chunks_.inUse();
  }

 private:
  const MutableSpan memory_; // without data: there is none for it
  const c10::Stream stream_;
  bool begun_ = false;
  Chunks chunks_;
};

} // namespace

std::unique_ptr<ChunkSource> directSource(
    std::shared_ptr<Devices> devices,
    const c10::Stream& stream,
    ConstSpan memory,
    c10::Storage owner) {
  return std::make_unique<DirectSource>(std::move(devices), stream, memory, std::move(owner));
}

std::unique_ptr<ChunkSink> directSink(std::shared_ptr<Devices> devices, const c10::Stream& stream, MutableSpan memory) {
  return std::make_unique<DirectSink>(std::move(devices), stream, memory);
}

} // namespace torch_rpc_mpi
