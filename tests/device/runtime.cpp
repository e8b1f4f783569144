// Devices, memory, streams and events.
#include "runtime.h"

#include <cstring>
#include <string>

#include "captures.h"
#include "devices.h"
#include "errors.h"
#include "memory.h"
#include "missing_waits.h"
#include "runtime_calls.h"

using namespace rpctest;

namespace {

Stream* streamAt(Stream* stream) {
  return stream == nullptr ? streamOf(currentDevice(), 0) : stream;
}

// Before the work is queued, as CUDA does with memory that is not pinned.
Task copyFromPageable(void* to, const void* from, size_t size) {
  const auto* bytes = static_cast<const char*>(from);
  return [to, kept = std::string(bytes, size)] { memcpy(to, kept.data(), kept.size()); };
}

} // namespace

int rpctestGetDeviceCount(int* count) {
  *count = deviceCount();
  return kSuccess;
}

int rpctestGetDevice(int* device) {
  *device = currentDevice();
  return kSuccess;
}

int rpctestSetDevice(int device) {
  if (physicalDevice(device) < 0) {
    return result(kInvalidDevice);
  }
  setCurrentDevice(device);
  return result(enter());
}

int rpctestDeviceCanAccessPeer(int* can, int device, int peer) {
  if (physicalDevice(device) < 0 || physicalDevice(peer) < 0) {
    return result(kInvalidDevice);
  }
  *can = canAccessPeer(device, peer) ? 1 : 0;
  return kSuccess;
}

int rpctestMalloc(void** pointer, size_t size) {
  const int error = enterWhereNothingCaptures();
  return result(
      error != kSuccess ? error : counted(Counted::kAllocations, 1, allocateDevice(pointer, size, currentDevice())));
}

int rpctestFree(void* pointer) {
  const int error = enterWhereNothingCaptures();
  if (error != kSuccess || pointer == nullptr) {
    return result(error);
  }
  synchronizeAll();
  return result(counted(Counted::kAllocations, -1, freeDevice(pointer)));
}

int rpctestHostAlloc(void** pointer, size_t size, unsigned) {
  const int error = enterWhereNothingCaptures();
  return result(error != kSuccess ? error : counted(Counted::kPinned, 1, allocatePinned(pointer, size)));
}

int rpctestFreeHost(void* pointer) {
  const int error = enterWhereNothingCaptures();
  if (error != kSuccess || pointer == nullptr) {
    return result(error);
  }
  synchronizeAll();
  return result(counted(Counted::kPinned, -1, freePinned(pointer)));
}

int rpctestHostRegister(void* pointer, size_t size, unsigned) {
  const int error = enterWhereNothingCaptures();
  return result(error != kSuccess ? error : counted(Counted::kRegistered, 1, registerHost(pointer, size)));
}

int rpctestHostUnregister(void* pointer) {
  const int error = enterWhereNothingCaptures();
  if (error != kSuccess) {
    return result(error);
  }
  synchronizeAll();
  return result(counted(Counted::kRegistered, -1, unregisterHost(pointer)));
}

int rpctestMemcpyAsync(void* to, const void* from, size_t size, int, Stream* stream) {
  const int error = enter();
  if (error != kSuccess) {
    return result(error);
  }
  Stream* queue = streamAt(stream);
  if (queue->ended()) {
    return result(kInvalidResourceHandle);
  }
  if (!onDevice(from) && !onPinnedHost(from)) {
    queue->push(copyFromPageable(to, from, size));
    return kSuccess;
  }
  queue->push([to, from, size] { memcpy(to, from, size); });
  if (!onDevice(to) && !onPinnedHost(to)) {
    countSynchronization();
    queue->synchronize();
  }
  return kSuccess;
}

int rpctestStreamCreateWithFlags(Stream** stream, unsigned) {
  const int error = enter();
  if (error == kSuccess) {
    *stream = makeStream(currentDevice());
  }
  return result(error);
}

int rpctestStreamDestroy(Stream* stream) {
  const int error = enter();
  if (error != kSuccess || stream == nullptr || stream->ended()) {
    return result(error != kSuccess ? error : kInvalidResourceHandle);
  }
  stream->end();
  return kSuccess;
}

int rpctestStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  const int error = enter();
  if (error != kSuccess || event == nullptr || streamAt(stream)->ended()) {
    return result(error != kSuccess ? error : kInvalidResourceHandle);
  }
  if (!leavesOut("StreamWaitEvent")) {
    event->block(*streamAt(stream));
  }
  return kSuccess;
}

int rpctestEventCreateWithFlags(Event** event, unsigned flags) {
  const int error = enter();
  if (error != kSuccess) {
    return result(error);
  }
  if ((flags & Event::kInterprocess) != 0 && (flags & Event::kDisableTiming) == 0) {
    return result(kInvalidValue);
  }
  *event = Event::make(currentDevice(), flags);
  return result(*event == nullptr ? kMemoryAllocation : kSuccess);
}

int rpctestEventDestroy(Event* event) {
  const int error = enter();
  if (error != kSuccess || event == nullptr) {
    return result(error != kSuccess ? error : kInvalidResourceHandle);
  }
  Event::destroy(event);
  return kSuccess;
}

int rpctestEventRecord(Event* event, Stream* stream) {
  const int error = enter();
  if (error != kSuccess) {
    return result(error);
  }
  Stream* queue = streamAt(stream);
  if (event == nullptr || queue->ended() || event->device() != queue->device()) {
    return result(kInvalidResourceHandle);
  }
  noteRecord(event);
  event->record(*queue);
  return kSuccess;
}

int rpctestEventQuery(Event* event) {
  const int error = enterWhereNothingCaptures();
  if (error != kSuccess || event == nullptr) {
    return result(error != kSuccess ? error : kInvalidResourceHandle);
  }
  return result(leavesOut("EventQuery", event) || event->query() ? kSuccess : kNotReady);
}

int rpctestThreadExchangeStreamCaptureMode(int* mode) {
  return result(exchangeCaptureMode(mode));
}

const char* rpctestGetErrorString(int error) {
  return errorText(error);
}

int rpctestGetLastError() {
  return takeLastError();
}
