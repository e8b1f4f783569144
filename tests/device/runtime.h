// The functions of the test device that a program finds by name in its library: those with the signatures of the CUDA
// runtime, which stand for it, and those for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "events.h"
#include "shared_file.h"
#include "streams.h"

#define RPCTEST_API extern "C" __attribute__((visibility("default")))

namespace c10 {
class Stream;
} // namespace c10

namespace rpctest {
struct Graph;
} // namespace rpctest

RPCTEST_API int rpctestGetDeviceCount(int* count);
RPCTEST_API int rpctestGetDevice(int* device);
RPCTEST_API int rpctestSetDevice(int device);
RPCTEST_API int rpctestDeviceCanAccessPeer(int* can, int device, int peer);

RPCTEST_API int rpctestMalloc(void** pointer, size_t size);
RPCTEST_API int rpctestFree(void* pointer);
RPCTEST_API int rpctestHostAlloc(void** pointer, size_t size, unsigned flags);
RPCTEST_API int rpctestFreeHost(void* pointer);
RPCTEST_API int rpctestHostRegister(void* pointer, size_t size, unsigned flags);
RPCTEST_API int rpctestHostUnregister(void* pointer);
RPCTEST_API int rpctestMemcpyAsync(void* to, const void* from, size_t size, int kind, rpctest::Stream* stream);

// A stream that is nullptr is the default stream of the current device.
RPCTEST_API int rpctestStreamCreateWithFlags(rpctest::Stream** stream, unsigned flags);
RPCTEST_API int rpctestStreamDestroy(rpctest::Stream* stream);
RPCTEST_API int rpctestStreamWaitEvent(rpctest::Stream* stream, rpctest::Event* event, unsigned flags);
RPCTEST_API int rpctestEventCreateWithFlags(rpctest::Event** event, unsigned flags);
RPCTEST_API int rpctestEventDestroy(rpctest::Event* event);
RPCTEST_API int rpctestEventRecord(rpctest::Event* event, rpctest::Stream* stream);
RPCTEST_API int rpctestEventQuery(rpctest::Event* event);

RPCTEST_API int rpctestIpcGetMemHandle(rpctest::Handle* handle, void* pointer);
RPCTEST_API int rpctestIpcOpenMemHandle(void** pointer, rpctest::Handle handle, unsigned flags);
RPCTEST_API int rpctestIpcCloseMemHandle(void* pointer);
RPCTEST_API int rpctestIpcGetEventHandle(rpctest::Handle* handle, rpctest::Event* event);
RPCTEST_API int rpctestIpcOpenEventHandle(rpctest::Event** event, rpctest::Handle handle);

RPCTEST_API int rpctestThreadExchangeStreamCaptureMode(int* mode);
RPCTEST_API const char* rpctestGetErrorString(int error);
RPCTEST_API int rpctestGetLastError();

// Of a stream of torch.
RPCTEST_API void* rpctestStreamHandle(const c10::Stream* stream);

// For tests, through ctypes: rpctest_device.py.
RPCTEST_API int rpctestStreamBeginCapture(int device, int64_t stream, int mode);
RPCTEST_API int rpctestStreamEndCapture(int device, int64_t stream, rpctest::Graph** graph);
RPCTEST_API int rpctestGraphLaunch(rpctest::Graph* graph, int device, int64_t stream);
RPCTEST_API void rpctestGraphDestroy(rpctest::Graph* graph);
RPCTEST_API void* rpctestNumberedStream(int device, int64_t stream);
RPCTEST_API void rpctestSleep(int device, int64_t stream, int64_t microseconds);
// The stream stands still until it is let go on.
RPCTEST_API void* rpctestHold(int device, int64_t stream);
RPCTEST_API void rpctestLetGo(void* hold);
RPCTEST_API void rpctestReturnToDevice(int device); // makes no context
RPCTEST_API int rpctestSynchronizeDevice(int device);
RPCTEST_API int rpctestPhysicalDevice(int device);
RPCTEST_API uint64_t rpctestContexts();
RPCTEST_API int rpctestInBadFork();
RPCTEST_API void rpctestAllowIpc(int allowed);
// What there is now, in the order of rpctest_device.Counts.
RPCTEST_API void rpctestCounts(int64_t* counts);
// The operators that have waited for their streams because they cannot be queued, a line each.
RPCTEST_API const char* rpctestUnqueued();
RPCTEST_API void rpctestEmptyCache();
