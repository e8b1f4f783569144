// Device memory that processes of one host share: what a lender and a borrower tell each other.
//
// Note [Lent memory]
// ~~~~~~~~~~~~~~~~~~
// A sender keeps regions of device memory, allocated when they are first needed, into which it copies what it sends to
// a neighbour; the neighbour copies it out from there. Only this memory is ever exported, not that of torch's tensors:
// handles name whole allocations, torch's may lie in segments that have none, and an open handle keeps the memory. A
// piece is lent with a ticket, which is sent when the copy into the piece is complete, as the sender's host has asked.
// (An event of the sender's for which the receiver's stream waits would spare that. But two processes take turns on a
// GPU, and one whose stream waits for the other seems to keep it from its turn. On an H200 a turn takes 137 us,
// whatever is in it, so that large tensors go in few large pieces.) The borrower gives the ticket back when its own
// copy is done, which it learns in the same way; a ticket that nobody has read is given back as well. What a peer had
// that has failed is not lent again. A pair of devices begins with an offer, which the peer tries to open. Until it
// has, and if it cannot, tensors go through pinned memory. So they do once it could not open a further region: the
// calls fail that had pieces of that, and the way is closed. A region that nothing was read from for some seconds is
// closed by those that have opened it, and freed by its lender when all have; but not the first.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "device/runtime.h"

namespace torch_rpc_mpi {

constexpr size_t kSmallPiece = size_t{4} << 20;   // bytes; larger ones have regions of their own
constexpr size_t kSmallRegion = size_t{32} << 20; // bytes
constexpr size_t kTickets = 128;                  // at once
constexpr size_t kSizeUnit = size_t{1} << 20;     // of regions

// In a message. `device` is the lender's.
struct Ticket {
  int32_t device = 0;
  uint32_t number = 0;
  uint32_t region = 0;      // of the device; the first was offered
  uint32_t regionUnits = 0; // its size, in kSizeUnit
  uint64_t offset = 0;      // in the region
  uint64_t bytes = 0;
  IpcHandle memory{}; // the region's
};

// A ticket that comes back; or a region that has been closed, by one to whom so many tickets of it had come.
struct LendingReturn {
  static constexpr uint32_t kClosed = UINT32_MAX; // instead of a ticket
  int32_t device = 0;
  uint32_t ticket = 0;
  uint32_t region = 0;
  uint32_t received = 0;
};

using DeviceName = std::array<char, 64>; // its UUID as text, the rest zeros

// What a lender tells a neighbour before the first ticket, from its device to one of theirs …
struct LendingOffer {
  int32_t here = 0, there = 0;
  DeviceName device{};
  IpcHandle memory{};
};
// … and what that says of it.
struct LendingVerdict {
  int32_t here = 0, there = 0; // of the offer
  uint32_t accepted = 0;
  std::array<char, 500> why{}; // not, ends with a zero
};

// A device that another process names. Throws std::out_of_range.
inline c10::DeviceIndex indexOf(int32_t device) {
  if (device < 0 || device > std::numeric_limits<c10::DeviceIndex>::max()) {
    throw std::out_of_range("it names a device that cannot be");
  }
  return static_cast<c10::DeviceIndex>(device);
}

} // namespace torch_rpc_mpi
