// Memory for torch's tensors: the caching allocator of the devices, and pinned memory of the host.
#pragma once

#include <cstdint>
#include <memory>

#include <c10/core/Allocator.h>

#include "streams.h"

namespace rpctest {

// As cudaCachingAllocator's: once freed, the memory is not used again before what is now queued on the stream is done.
void recordStream(const c10::DataPtr& pointer, Stream* stream);

c10::Allocator* pinnedAllocator();

// Keeps pinned memory from being used again, as long as a copy that is queued needs it. Of other memory nothing.
std::shared_ptr<void> keepPinned(const c10::DataPtr& pointer);

// Of tensors.
int64_t liveBlocks();
int64_t liveBytes();

} // namespace rpctest
