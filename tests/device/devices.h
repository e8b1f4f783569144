// The devices that this process sees, the current one of each thread, and the contexts: which devices the process has
// used. As with CUDA, a new thread's current device is 0, and nearly every call makes a context on the current device.
#pragma once

#include <cstdint>

namespace rpctest {

// Of RPCTEST_DEVICES physical devices (2), those in RPCTEST_VISIBLE_DEVICES, such as "1,0".
int deviceCount();
int physicalDevice(int device);  // -1 for what does not exist
int visibleDevice(int physical); // -1 if this process does not see it

int currentDevice();
void setCurrentDevice(int device); // makes no context
void touch(int device);
bool hasContext(int device);
uint64_t contexts(); // a bit per device

// In the child of a process that had a context, nothing works.
bool inBadFork();

// Whether one device may use another's memory: unless RPCTEST_NO_PEER is set.
bool canAccessPeer(int device, int peer);

// Whether memory and events may be shared between processes: unless RPCTEST_NO_IPC is set or a test forbids it.
bool ipcAllowed();
void allowIpc(bool allowed);

int64_t environmentNumber(const char* name, int64_t otherwise);

} // namespace rpctest
