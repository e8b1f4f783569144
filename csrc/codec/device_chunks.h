// Parts of messages that come from a device's memory, or go to one, chunk by chunk: as bytes, through a ring of pinned
// memory, or as tickets of memory that neighbours lend each other.
#pragma once

#include <memory>

#include <c10/core/Stream.h>

#include "device/devices.h"
#include "peer/message.h"

namespace torch_rpc_mpi {

// The stream is the one in which the memory is used; a sink without data drops what comes.
std::unique_ptr<ChunkSource> pinnedSource(
    std::shared_ptr<Devices> devices,
    const c10::Stream& stream,
    ConstSpan memory);
std::unique_ptr<ChunkSink> pinnedSink(std::shared_ptr<Devices> devices, const c10::Stream& stream, MutableSpan memory);
// piece: bytes of a ticket. Null if there is no piece free now.
std::unique_ptr<ChunkSource> ticketSource(
    std::shared_ptr<Devices> devices,
    int borrower,
    const c10::Stream& stream,
    ConstSpan memory,
    size_t piece);
std::unique_ptr<ChunkSink> ticketSink(
    std::shared_ptr<Devices> devices,
    int lender,
    const c10::Stream& stream,
    MutableSpan memory,
    size_t piece);

} // namespace torch_rpc_mpi
