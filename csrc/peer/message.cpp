#include "peer/message.h"

#include "peer/outgoing.h"

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

void OutboundMessage::complete(ProgressToken& token, const OperationStatus& status) noexcept {
  outgoing_->operationDone(token, *this, 1, status.error);
}

} // namespace torch_rpc_mpi
