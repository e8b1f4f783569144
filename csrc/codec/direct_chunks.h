// Parts of messages that MPI reads from a device's memory itself, or writes to it: a GPU-aware one.
#pragma once

#include <memory>

#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include "device/devices.h"
#include "peer/message.h"

namespace torch_rpc_mpi {

// Of the chunks of pinnedSource() and pinnedSink(), which may be at the other end. The stream is the one in which the
// memory is used: what lies in it comes first. A sink without data drops what comes.
std::unique_ptr<ChunkSource> directSource(
    std::shared_ptr<Devices> devices,
    const c10::Stream& stream,
    ConstSpan memory,
    c10::Storage owner);
std::unique_ptr<ChunkSink> directSink(std::shared_ptr<Devices> devices, const c10::Stream& stream, MutableSpan memory);

} // namespace torch_rpc_mpi
