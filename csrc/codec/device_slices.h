// The slices of a message that lie on devices, or are to: on their way out, in, and to oneself.
//
// Note [The way of a device tensor]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// When a message is sent, it takes a stream for each device that its tensors are on; the stream waits for what lies in
// the sender's current one, and the caching allocator is told that the memory is used in it (recordStream), so that the
// tensors may be freed at once, though not written to before the call's answer. The receiver takes a stream for each of
// its devices; memory is allocated in it, what arrives is copied in it, and the callee's function, or the callbacks of
// the call's future, run with it as the current one: so nobody waits, and all is in order. Small slices are copied to
// one pinned block and from there into the frame, larger ones chunk by chunk through a ring of pinned blocks, or
// straight from and to the device's memory where MPI can; what the host or MPI reads is read after an event. See Note
// [Nothing waits for a device].
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include "codec/tensor_codec.h"
#include "device/devices.h"
#include "peer/message.h"

namespace torch_rpc_mpi {

using Streams = std::vector<c10::Stream>;

const c10::Stream& streamOf(const Streams& streams, c10::Device device);

// Which of them are on a device, or have to get to one: false for none.
bool anyOnDevice(const std::vector<at::Tensor>& tensors, const std::vector<c10::Device>& targets);

// On their way out: made by the sender's thread, while its current streams are those that the tensors are used in.
class OutboundSlices {
 public:
  // devices: null at a worker that uses none and sends to one that does. targets: for each tensor. inCurrent: the
  // current streams are the message's own.
  OutboundSlices(
      std::shared_ptr<Devices> devices,
      const std::vector<at::Tensor>& tensors,
      std::vector<c10::Device> targets,
      int peer,
      bool inCurrent);

  const Streams& streams() const {
    return streams_;
  }
  const std::vector<c10::Device>& targets() const {
    return targets_;
  }
  Devices& devices() const {
    return *devices_;
  }

  // How a slice travels. Those of the host as without devices; of a device in the body, in lent memory that the body
  // names, or on the bulk channel, as bytes or as tickets.
  enum class Way : uint8_t { kHost, kGathered, kLent, kBytes, kTickets };
  // Chooses the ways, and begins to copy what is gathered or lent.
  void begin(const TensorWriter& writer, size_t inlineLimit);
  Way wayOf(size_t slice) const {
    return slices_[slice].way;
  }
  // Of one that goes as tickets: the bytes of each.
  size_t pieceOf(size_t slice) const {
    return slices_[slice].piece;
  }
  // What a lent one lies in, counted from 1, and where.
  uint32_t ticketOf(size_t slice) const {
    return slices_[slice].ticket;
  }
  size_t offsetOf(size_t slice) const {
    return slices_[slice].offset;
  }
  const std::vector<Ticket>& tickets() const {
    return tickets_;
  }
  // Whether its copies lie in the caller's own streams, and so are to be queued while the caller sends.
  bool inCurrent() const {
    return inCurrent_;
  }
  // The message leaves, and its tickets with it.
  void leaves() noexcept {
    left_ = true;
  }
  // Where the bytes of a gathered one come to when all are ready.
  void placeAt(size_t slice, char* place) {
    slices_[slice].place = place;
  }
  ~OutboundSlices();
  OutboundSlices(const OutboundSlices&) = delete;
  OutboundSlices& operator=(const OutboundSlices&) = delete;
  // With what is gathered in its place.
  bool ready();
  // What gives the chunks of one on the bulk channel; null for one of the host.
  std::unique_ptr<ChunkSource> sourceOf(const TensorWriter& writer, size_t slice);

 private:
  struct Slice {
    Way way = Way::kHost;
    uint32_t ticket = 0;
    size_t piece = 0;
    size_t offset = 0; // in the block or the lent piece
    size_t bytes = 0;
    char* place = nullptr;
    std::unique_ptr<ChunkSource> source; // of one that goes as tickets, with its first
  };
  void chooseWays(const TensorWriter& writer, size_t inlineLimit);
  void lend(const TensorWriter& writer);
  void gather(const TensorWriter& writer);

  const std::shared_ptr<Devices> devices_;
  const std::vector<c10::Device> targets_;
  const int peer_;
  const bool inCurrent_;
  Streams streams_; // of the devices that the tensors are on
  std::vector<Slice> slices_;
  std::vector<Ticket> tickets_;
  bool left_ = false;
  // What is gathered.
  PinnedBlock block_;
  std::vector<DeviceEvent> events_;
};

// On their way in.
class InboundSlices {
 public:
  InboundSlices(std::shared_ptr<Devices> devices, int source)
      : devices_(std::move(devices)),
        source_(source),
        streams_(devices_->poolStreams()) {}

  const Streams& streams() const {
    return streams_;
  }
  Devices& devices() const {
    return *devices_;
  }
  // Throws BadMessage if this agent does not use that device.
  c10::Device device(int index) const;
  at::DataPtr allocate(c10::Device device, size_t bytes) const {
    return devices_->allocate(streamOf(streams_, device), bytes);
  }
  // Copies what lies in the host's memory, which may be changed then. Several together take less than each alone.
  struct Copy {
    c10::Device device;
    void* to;
    const char* from;
    size_t bytes;
  };
  void copy(const std::vector<Copy>& copies) const;
  // What takes the chunks of a larger one. Without memory it drops them. piece: bytes of each, where
  // they are tickets; else 0.
  std::unique_ptr<ChunkSink> sinkFor(c10::Device device, void* memory, size_t bytes, size_t piece) const;
  // Tickets that came with the frame: each goes back when it has been used, or with this.
  void borrow(const Ticket& ticket);
  // Copies from what was borrowed with one of them, counted from 1. Throws BadMessage.
  void copyLent(uint32_t ticket, size_t offset, c10::Device device, void* to, size_t bytes);
  void checkLent(uint32_t ticket, size_t offset, size_t bytes) const; // the same, before there is memory for it
  // No more is copied from there.
  void endLoans();
  ~InboundSlices();
  InboundSlices(const InboundSlices&) = delete;
  InboundSlices& operator=(const InboundSlices&) = delete;

 private:
  const std::shared_ptr<Devices> devices_;
  const int source_;
  const Streams streams_;
  struct Borrowed {
    std::shared_ptr<Borrower::Loan> loan;
    std::optional<c10::Stream> reader; // once it is read from
    const char* memory = nullptr;
  };
  std::vector<Borrowed> borrowed_;
};

} // namespace torch_rpc_mpi
