#include "peer/frame.h"

#include "host/fork_guard.h"

namespace torch_rpc_mpi {

namespace {

// Buffers kept for reuse: what a burst leaves over beyond this goes back to the system.
constexpr size_t kKeptBuffers = 256;

} // namespace

FrameBuffer::FrameBuffer(std::shared_ptr<FramePool> pool, std::unique_ptr<char[]> data)
    : pool_(std::move(pool)),
      data_(std::move(data)) {}

FrameBuffer& FrameBuffer::operator=(FrameBuffer&& other) noexcept {
  if (this != &other) {
    giveBack();
    pool_ = std::move(other.pool_);
    data_ = std::move(other.data_);
  }
  return *this;
}

FrameBuffer::~FrameBuffer() {
  giveBack();
}

void FrameBuffer::giveBack() {
  if (data_ != nullptr) {
    pool_->put(std::move(data_));
  }
}

size_t FrameBuffer::capacity() const {
  return pool_->capacity();
}

FramePool::FramePool(size_t capacity) : capacity_(capacity) {
  free_.reserve(kKeptBuffers); // put() is called by destructors, which must not throw
  watchForks();
}

FrameBuffer FramePool::get() {
  std::unique_ptr<char[]> data;
  if (!inForkedChild()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      data = std::move(free_.back());
      free_.pop_back();
    }
  }
  if (data == nullptr) {
    data.reset(new char[capacity_]); // not zeroed: every byte sent or read was written before
  }
  return FrameBuffer(shared_from_this(), std::move(data));
}

void FramePool::put(std::unique_ptr<char[]> data) {
  if (inForkedChild()) {
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.size() < kKeptBuffers) {
    free_.push_back(std::move(data));
  }
}

std::optional<FrameHeader> parseFrame(const char* data, size_t bytes) {
  FrameHeader header;
  if (bytes < sizeof(header)) {
    return std::nullopt;
  }
  std::memcpy(&header, data, sizeof(header));
  const bool known = header.kind >= FrameKind::kRequest && header.kind <= FrameKind::kReturn;
  const bool inlineFits = header.bodyInBulk != 0 || header.bodyBytes == bytes - sizeof(header);
  const bool bulkFits = header.bodyInBulk == 0 || bytes == sizeof(header);
  const bool partsFit = header.bulkParts <= header.bodyBytes / sizeof(uint64_t);
  const bool carries = header.kind == FrameKind::kRequest || header.kind == FrameKind::kResponse;
  const bool bare = header.kind == FrameKind::kCredit || header.kind == FrameKind::kForget;
  const bool kindFits = carries ||
      (header.tickets == 0 && header.bodyInBulk == 0 && header.bulkParts == 0 && (!bare || header.bodyBytes == 0));
  if (header.magic != FrameHeader::kMagic || !known || !inlineFits || !bulkFits || !partsFit || !kindFits) {
    return std::nullopt;
  }
  return header;
}

std::optional<FrameHeader> parseFrameOfBatch(ConstSpan rest) {
  FrameHeader header;
  if (rest.bytes < sizeof(header)) {
    return std::nullopt;
  }
  std::memcpy(&header, rest.data, sizeof(header));
  if (header.bodyBytes > rest.bytes - sizeof(header)) {
    return std::nullopt;
  }
  const auto parsed = parseFrame(rest.data, sizeof(header) + header.bodyBytes);
  const bool fits = parsed && parsed->kind != FrameKind::kBatch && parsed->bodyInBulk == 0 && parsed->bulkParts == 0;
  return fits ? parsed : std::nullopt;
}

} // namespace torch_rpc_mpi
