// The runtime library of a kind of device (CUDA's, HIP's), found among those that torch has loaded.
//
// Note [Devices without a toolkit]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Streams, guards, allocation and recordStream come from c10's interfaces, which are the same for every kind of device.
// What these lack (asynchronous copies between any memory, handles of memory, pinned memory of our own) is called
// through a table of functions of the runtime library, looked up when a session with devices begins. So nothing of a
// vendor is needed to build, and one build serves every build of a torch minor. The functions have CUDA's signatures
// and constants, which HIP's share.
//
// Note [Nothing waits for a device]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// No thread of ours waits for a stream or a device: work is put into streams, events are recorded behind it, other
// streams wait for the events, and where the host needs to know, it asks (EventQuery) in the turns that it makes
// anyway. To free pinned or device memory waits for the device; so it is pooled, and freed when nothing uses it. Each
// call is made with the device set that it concerns, so that no context appears on another, and those that a stream
// capture of the program forbids with this thread's capture mode relaxed, as they concern no stream that is captured.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

namespace torch_rpc_mpi {

struct IpcHandle {
  char reserved[64];
};

struct RuntimeTable {
#define RUNTIME_FUNCTION(name, parameters) int(*name) parameters = nullptr;
#include "device/runtime_functions.h"
#undef RUNTIME_FUNCTION
  const char* (*GetErrorString)(int) = nullptr;
  int (*GetLastError)() = nullptr;
  // A member function of torch's class of streams, which is a c10::Stream and nothing else.
  void* (*streamHandle)(const c10::Stream* stream) = nullptr;
};

// What a call of the runtime failed of; what() names the function and has the runtime's text.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Immutable.
class DeviceRuntime {
 public:
  DeviceRuntime(c10::DeviceType type, RuntimeTable table, std::string library)
      : type_(type),
        table_(table),
        library_(std::move(library)) {}
  // Throws DeviceError if it is not there or lacks a function.
  static std::shared_ptr<const DeviceRuntime> find(c10::DeviceType type);
  // For a kind of device that torch knows as PrivateUse1: its functions, with this prefix, are in this library.
  static void useLibrary(c10::DeviceType type, std::string library, std::string prefix);

  c10::DeviceType type() const {
    return type_;
  }
  const std::string& library() const {
    return library_;
  }
  const RuntimeTable& table() const {
    return table_;
  }
  // Throws DeviceError if a call that returned `status` failed.
  void check(int status, const char* function) const;
  void* handleOf(const c10::Stream& stream) const {
    return table_.streamHandle(&stream);
  }

  // From device or host to either.
  void copy(void* to, const void* from, size_t bytes, void* stream) const;
  void waitFor(void* stream, void* event) const;
  void record(void* event, void* stream) const;
  bool complete(void* event) const;
  void* createEvent() const;
  void destroyEvent(void* event) const noexcept;
  void* allocatePinned(size_t bytes) const;
  void freePinned(void* memory) const noexcept;

 private:
  const c10::DeviceType type_;
  const RuntimeTable table_;
  const std::string library_;
};

// While it lives, a device is the current one of this thread.
class OnDevice {
 public:
  OnDevice(const DeviceRuntime& runtime, c10::DeviceIndex device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const DeviceRuntime& runtime_;
  const c10::DeviceIndex device_;
  c10::DeviceIndex before_;
};

// While it lives, this thread's calls do not spoil a capture of another thread's stream.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const DeviceRuntime& runtime);
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const DeviceRuntime& runtime_;
  int mode_ = 2; // relaxed
};

} // namespace torch_rpc_mpi
