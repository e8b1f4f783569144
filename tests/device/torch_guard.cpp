// The device guard: how torch sets devices and uses streams and events. It makes the same calls of the runtime as the
// guard of CUDA, so that a context appears where one would there.
#include "torch_streams.h"

#include <array>

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "captures.h"
#include "devices.h"
#include "missing_waits.h"
#include "runtime.h"
#include "torch_allocator.h"

namespace rpctest {

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

thread_local std::array<int64_t, 64> currentStreams{}; // ids by device; the default stream's is 0

int indexOf(Device device) {
  return device.has_index() ? device.index() : currentDevice();
}

c10::Stream streamWithId(Device device, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, asDevice(indexOf(device)), id);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override {
    return DeviceType::PrivateUse1;
  }

  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  Device getDevice() const override {
    return asDevice(currentDevice());
  }

  void setDevice(Device device) const override {
    if (device.index() != currentDevice()) {
      check(rpctestSetDevice(device.index()));
    }
  }

  // Back to a device that may have no context yet, and needs none for that.
  void uncheckedSetDevice(Device device) const noexcept override {
    setCurrentDevice(device.index());
  }

  c10::Stream getStream(Device device) const override {
    return currentStream(device);
  }

  c10::Stream getDefaultStream(Device device) const override {
    return streamWithId(device, 0);
  }

  c10::Stream getStreamFromGlobalPool(Device device, bool highPriority) const override {
    return streamWithId(device, nextPoolStream(indexOf(device), highPriority));
  }

  c10::Stream getNewStream(Device device, int priority) const override {
    return getStreamFromGlobalPool(device, priority < 0);
  }

  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = currentStream(stream.device());
    currentStreams.at(static_cast<size_t>(stream.device_index())) = stream.id();
    return before;
  }

  void destroyEvent(void* event, const DeviceIndex device) const noexcept override {
    if (event != nullptr) {
      const int before = currentDevice();
      rpctestSetDevice(device);
      rpctestEventDestroy(static_cast<Event*>(event));
      rpctestSetDevice(before);
    }
  }

  void record(void** event, const c10::Stream& stream, const DeviceIndex device, const c10::EventFlag flag)
      const override {
    TORCH_CHECK(
        device == -1 || device == stream.device_index(), "rpctest: an event of device ", int{device},
        " is recorded on a stream of device ", int{stream.device_index()});
    const Device before = getDevice();
    setDevice(stream.device());
    auto* recorded = static_cast<Event*>(*event);
    if (recorded == nullptr) {
      check(
          rpctestEventCreateWithFlags(&recorded, flag == c10::EventFlag::PYTORCH_DEFAULT ? Event::kDisableTiming : 0));
    }
    check(rpctestEventRecord(recorded, handleOf(stream)));
    *event = recorded;
    setDevice(before);
  }

  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) {
      const Device before = getDevice();
      setDevice(stream.device());
      check(rpctestStreamWaitEvent(handleOf(stream), static_cast<Event*>(event), 0));
      setDevice(before);
    }
  }

  bool queryEvent(void* event) const override {
    if (event == nullptr) {
      return true;
    }
    const int error = rpctestEventQuery(static_cast<Event*>(event));
    if (error == kNotReady) {
      rpctestGetLastError();
      return false;
    }
    check(error);
    return true;
  }

  DeviceIndex deviceCount() const noexcept override {
    return static_cast<DeviceIndex>(rpctest::deviceCount());
  }

  bool queryStream(const c10::Stream& stream) const override {
    check(checkNoCapture());
    return queueOf(stream)->idle();
  }

  void synchronizeStream(const c10::Stream& stream) const override {
    check(checkNoCapture());
    countSynchronization();
    queueOf(stream)->synchronize();
  }

  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      check(checkNoCapture());
      countSynchronization();
      static_cast<Event*>(event)->synchronize();
    }
  }

  void synchronizeDevice(const DeviceIndex device) const override {
    check(checkNoCapture());
    countSynchronization();
    rpctest::synchronizeDevice(device);
  }

  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    if (!leavesOut("RecordStream")) {
      recordStream(pointer, queueOf(stream));
    }
  }

  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    return static_cast<Event*>(end)->millisecondsSince(*static_cast<Event*>(start));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

} // namespace

c10::Stream currentStream(Device device) {
  return streamWithId(device, currentStreams.at(static_cast<size_t>(indexOf(device))));
}

Stream* handleOf(const c10::Stream& stream) {
  return stream.id() == 0 ? nullptr : queueOf(stream);
}

Stream* queueOf(const c10::Stream& stream) {
  return streamOf(stream.device_index(), stream.id());
}

} // namespace rpctest

void* rpctestStreamHandle(const c10::Stream* stream) {
  return rpctest::handleOf(*stream);
}
