#include "peer/message.h"

#include "host/pages.h"
#include "peer/sending.h"

namespace torch_rpc_mpi {

void OutboundMessage::encode(FramePool& pool) {
  std::vector<ConstSpan> parts;
  const size_t planned = planBody(parts);
  const size_t sizesBytes = parts.size() * sizeof(uint64_t);
  header_.bulkParts = static_cast<uint32_t>(parts.size());
  header_.bodyBytes = sizesBytes + planned;
  FrameBuffer frame = pool.get();
  char* body = frame.body();
  if (header_.bodyBytes > pool.bodyCapacity()) {
    header_.bodyInBulk = 1;
    separateBody_.reset(new char[header_.bodyBytes]);
    body = separateBody_.get();
    parts_.push_back({body, header_.bodyBytes});
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    const uint64_t bytes = parts[i].bytes;
    std::memcpy(body + i * sizeof(uint64_t), &bytes, sizeof(bytes));
  }
  writeBody(body + sizesBytes);
  parts_.insert(parts_.end(), parts.begin(), parts.end());
  frame_ = std::move(frame);
}

bool OutboundMessage::giveBackMemory() noexcept {
  giveBack(separateBody_.get(), separateBody_ != nullptr ? header_.bodyBytes : 0);
  return true;
}

void OutboundMessage::giveBack(void* data, size_t bytes) const noexcept {
  char* begin = static_cast<char*>(data);
  const char* const end = begin + bytes;
  for (const ConstSpan& chunk : posted_) {
    if (chunk.data >= begin && chunk.data < end) {
      giveBackPages(begin, static_cast<size_t>(chunk.data - begin));
      begin += chunk.data - begin + static_cast<ptrdiff_t>(chunk.bytes);
    }
  }
  giveBackPages(begin, static_cast<size_t>(end - begin));
}

void OutboundMessage::complete(ProgressToken& token, const OperationStatus& status) noexcept {
  sending_->operationDone(token, *this, 1, status.error);
}

} // namespace torch_rpc_mpi
