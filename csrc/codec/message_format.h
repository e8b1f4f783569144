// What the body of a message begins with: where its data are, and where they go. OutboundRpc writes it.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/tensor_codec.h"
#include "device/lending.h"
#include "peer/frame.h"

namespace torch_rpc_mpi {

// The head of a body. Behind it: the sizes of all slices (uint64_t each, the top bit set for those inside the body),
// where the slices are and are to be if any is on a device or is to be on one, the tickets of lent device memory, the
// tensor descriptions, the payload unless it is a bulk part, the slices that are inside.
struct BodyHead {
  uint64_t payloadBytes;
  uint64_t descriptionBytes;
  uint32_t tensors;
  uint32_t slices;
  uint32_t payloadInBulk;
  uint16_t placed; // 1: there are places
  uint16_t tickets;
};

// Of a slice at the receiver.
struct SlicePlace {
  int32_t device = -1; // none: its host
  uint32_t ticket = 0; // of the memory that it lies in, counted from 1; kTicketsFollow: of its chunks; 0: none
  uint64_t offset = 0; // in that memory; kTicketsFollow: bytes of each piece
};
constexpr uint32_t kTicketsFollow = UINT32_MAX;

constexpr uint64_t kInside = uint64_t{1} << 63;

// What is read from a body without touching its data.
struct Outline {
  BodyHead head;
  std::vector<size_t> sizes;
  std::vector<bool> inside;
  std::vector<SlicePlace> places; // none: all at the host
  std::vector<Ticket> tickets;
  bool onHost(size_t slice) const {
    return places.empty() || places[slice].device < 0;
  }
  bool isLent(size_t slice) const {
    return !places.empty() && places[slice].ticket != 0 && places[slice].ticket != kTicketsFollow;
  }
  bool isBulk(size_t slice) const {
    return !inside[slice] && !isLent(slice);
  }
  ConstSpan descriptions;
};

// Throws BadMessage. The reader's next bytes are those of the data.
Outline readOutline(Reader& reader);

} // namespace torch_rpc_mpi
