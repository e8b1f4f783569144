// What travels on the frame channel: a fixed header, then a body if it fits; larger data follows on the bulk channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace torch_rpc_mpi {

struct ConstSpan {
  const char* data = nullptr;
  size_t bytes = 0;
};
struct MutableSpan {
  char* data = nullptr;
  size_t bytes = 0;
};

enum class FrameKind : uint8_t {
  kRequest = 1,
  kResponse = 2,
  kCredit = 3,  // nothing but the header's counters
  kGoodbye = 4, // the sender leaves; it neither serves nor answers from now on. Body: see agent/farewell.h
  kDrain = 5,   // see agent/drain.h
  kForget = 6,  // nothing but the header: nobody waits any more for the answer to the call that it names
  kBatch = 7,   // small frames that had to wait, one after the other, each with its header
  kInquiry = 8, // both: see agent/late_calls.h
  kStatement = 9,
  kLost = 10,  // see agent/loss_news.h
  kOffer = 11, // these three: see Note [Lent memory] in device/lending.h
  kVerdict = 12,
  kReturn = 13
};

// All ranks run one build on one architecture (checked when the group forms), so the structs travel as they are.
struct FrameHeader {
  static constexpr uint32_t kMagic = 0x52504d35; // "RPM5": raise the digit with every change of the protocol

  uint32_t magic = kMagic;
  FrameKind kind = FrameKind::kRequest;
  uint8_t bodyInBulk = 0;    // the body did not fit: it is the first thing on the bulk channel
  uint8_t secondAttempt = 0; // of a request: see Note [Second attempts]
  uint8_t tickets = 0;       // of a request or response: device memory that is lent with it
  uint64_t callId = 0;
  uint32_t messageType = 0; // torch's MessageType
  uint32_t bulkParts = 0;   // their sizes, uint64_t each, stand at the start of the body
  uint64_t bodyBytes = 0;
  uint64_t chargedBytes = 0; // what this request takes of the receiver's byte credit: nothing if it is small
  // Cumulative: how many requests of the receiver's, and how many bytes, the sender has taken off its hands.
  uint64_t releasedRequests = 0;
  uint64_t releasedBytes = 0;
};
static_assert(sizeof(FrameHeader) == 56);

// A fixed-size block that a frame is built in or received into. Returns to its pool on destruction.
class FramePool;
class FrameBuffer {
 public:
  FrameBuffer() = default;
  FrameBuffer(std::shared_ptr<FramePool> pool, std::unique_ptr<char[]> data);
  FrameBuffer(FrameBuffer&&) noexcept = default;
  FrameBuffer& operator=(FrameBuffer&&) noexcept;
  ~FrameBuffer();

  explicit operator bool() const {
    return data_ != nullptr;
  }
  char* data() const {
    return data_.get();
  }
  char* body() const {
    return data_.get() + sizeof(FrameHeader);
  }
  size_t capacity() const;

 private:
  void giveBack();
  std::shared_ptr<FramePool> pool_;
  std::unique_ptr<char[]> data_;
};

// Thread-safe: mutex_ guards free_, and is not taken in a forked child, see Note [Locks in a forked child].
class FramePool : public std::enable_shared_from_this<FramePool> {
 public:
  explicit FramePool(size_t capacity);
  size_t capacity() const {
    return capacity_;
  }
  size_t bodyCapacity() const {
    return capacity_ - sizeof(FrameHeader);
  }
  FrameBuffer get();

 private:
  friend class FrameBuffer;
  void put(std::unique_ptr<char[]> data);
  const size_t capacity_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<char[]>> free_;
};

// The header of a received frame, or nothing when it is not one of ours or its lengths do not fit what arrived.
std::optional<FrameHeader> parseFrame(const char* data, size_t bytes);
// The same of the next frame in the body of a batch, which more may follow.
std::optional<FrameHeader> parseFrameOfBatch(ConstSpan rest);

} // namespace torch_rpc_mpi
