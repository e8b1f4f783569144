// Memory and events of other processes. Other errors than CUDA's are possible, but for the same reasons.
#include "devices.h"
#include "memory.h"
#include "runtime.h"
#include "runtime_calls.h"

using namespace rpctest;

namespace {

constexpr unsigned kLazyEnablePeerAccess = 1;

} // namespace

// Of the whole allocation, wherever in it the pointer lies.
int rpctestIpcGetMemHandle(Handle* handle, void* pointer) {
  const int error = enter();
  if (error != kSuccess) {
    return result(error);
  }
  if (!ipcAllowed()) {
    return result(kNotSupported);
  }
  const auto range = rangeOf(pointer);
  if (!range || range->kind != Range::Kind::kDevice) {
    return result(kInvalidValue);
  }
  *handle = range->handle;
  return kSuccess;
}

int rpctestIpcOpenMemHandle(void** pointer, Handle handle, unsigned flags) {
  const int error = enterWhereNothingCaptures();
  if (error != kSuccess) {
    return result(error);
  }
  if (handle.kind != Handle::Kind::kMemory) {
    return result(kInvalidValue);
  }
  if (isOwn(handle)) {
    return result(kInvalidContext);
  }
  const int device = visibleDevice(handle.device);
  if (device < 0) {
    return result(kInvalidDevice);
  }
  if (!ipcAllowed()) {
    return result(kNotSupported);
  }
  if (device != currentDevice() && ((flags & kLazyEnablePeerAccess) == 0 || !canAccessPeer(currentDevice(), device))) {
    return result(kPeerAccessUnsupported);
  }
  return result(counted(Counted::kOpened, 1, openMemory(pointer, handle, device)));
}

int rpctestIpcCloseMemHandle(void* pointer) {
  const int error = enterWhereNothingCaptures();
  if (error != kSuccess) {
    return result(error);
  }
  synchronizeAll();
  return result(counted(Counted::kOpened, -1, closeMemory(pointer)));
}

int rpctestIpcGetEventHandle(Handle* handle, Event* event) {
  const int error = enter();
  if (error != kSuccess) {
    return result(error);
  }
  if (event == nullptr || (event->flags() & Event::kInterprocess) == 0) {
    return result(kInvalidResourceHandle);
  }
  if (!ipcAllowed()) {
    return result(kNotSupported);
  }
  *handle = event->handle();
  return kSuccess;
}

int rpctestIpcOpenEventHandle(Event** event, Handle handle) {
  const int error = enterWhereNothingCaptures();
  if (error != kSuccess) {
    return result(error);
  }
  if (handle.kind != Handle::Kind::kEvent) {
    return result(kInvalidValue);
  }
  if (isOwn(handle)) {
    return result(kInvalidContext);
  }
  const int device = visibleDevice(handle.device);
  if (device < 0) {
    return result(kInvalidDevice);
  }
  *event = ipcAllowed() ? Event::open(handle, device) : nullptr;
  return result(*event == nullptr ? kMapBufferFailed : kSuccess);
}
